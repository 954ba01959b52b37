"""Which environments and tools a config may name beside its other keys."""

from __future__ import annotations

from pathlib import Path

import pytest
from inside import sapo_train
from tiny import make_stand_in


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            ["environment.name=gues"],
            "environment.name (command line): unknown environment 'gues'; did you mean 'guess'?",
        ),
        (["+environment.args.low=1"], "is {'low': 1}, and environment.name is null"),
        (["environment.name=guess", "+environment.args.lwo=1"], "environment.args.lwo"),
        (
            ["environment.name=guess", "+reward.functions.environment.function=numeric_digits"],
            "take another",
        ),
        (
            ["environment.name=guess", "data.response_prefix='<think>'"],
            "data.response_prefix (command line): is for one turn",
        ),
        (["environment.name=guess", "data.chat_template=false"], "an environment or tools need a chat"),
        (
            ["environment.name=guess", "environment.max_tokens=5000"],
            "environment.max_tokens (command line): is 5000, with",
        ),
        (["tools=[search]"], "'search' is no dotted path; a tool is a function of yours: my_tools.search"),
        (["tools=[nothing.search]"], "tool 'nothing.search': there is no module 'nothing'"),
        (["environment.on_error=zero"], "unknown value 'zero'; did you mean 'drop'?"),
    ],
)
def test_what_cannot_be_is_told_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_stand_in(tmp_path / "model", max_position_embeddings=4096)
    code, _, err = sapo_train("config=quickstart", f"model.path={model}", *changes)
    assert code == 2 and told in err, err


def test_an_environment_alone_rewards_and_bounds_the_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_stand_in(tmp_path / "model", max_position_embeddings=4096)
    code, out, err = sapo_train("config=guess", f"model.path={model}", "dry_run=true")
    assert code == 0, err
    assert f"{128 + 96} tokens" in out
