"""Which environments and tools a config may name beside its other keys."""

from __future__ import annotations

import re
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
        (
            ["environment.name=endpoint", "environment.args.run=nothing.run"],
            "environment.name (command line): agent 'nothing.run': there is no module 'nothing'",
        ),
        (
            ["environment.name=endpoint", "environment.args.run=json.loads", "tools=[json.dumps]"],
            "tools (command line): are for the model to call by us; an agent (endpoint) offers it tools of its own",
        ),
        (
            ["environment.name=endpoint", "environment.args.run=json.loads", "data.system_prompt=Be brief."],
            "data.system_prompt (command line): is for prompts that we word; an agent (endpoint) words its own",
        ),
        (["environment.name=endpoint"], "environment.args (default): 'run' is missing"),
        (["environment.on_error=zero"], "unknown value 'zero'; did you mean 'drop'?"),
        (
            ["+environments.a={name: gues}"],
            "environments.a.name (command line): unknown environment 'gues'; did you mean",
        ),
        (
            ["environment.name=guess", "+environments.a={name: guess}"],
            "environment.name (command line): is guess, and there are environments; set it under each, or leave",
        ),
        (
            ["+environments.a.name=guess", "environments.a.args.lwo=1"],
            "environments.a.args.lwo (command line): unknown argument; did you mean 'low'?",
        ),
        (
            ["+environments.a={name: guess, max_tokens: 5000}", "+environments.b={name: guess}"],
            "environments.a.max_tokens (command line): is 5000, with",
        ),
        (["+environments.a={name: guess, turn: 1}"], "environments.a"),
        (
            ["+environments.a={name: guess, args: {high: 9}, max_tokens: 5000}"],
            "environments.a.max_tokens (command line): is 5000, with",
        ),
        (
            ["++environments.a.name=guess", "++environments.a.max_tokens=5000"],
            "environments.a.max_tokens (command line): is 5000, with",
        ),
        (
            ["+reward.functions.brief={function: length_limit, args: {max_tokns: 40}}"],
            "reward.functions.brief.args.max_tokns",
        ),
    ],
)
def test_what_cannot_be_is_told_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_stand_in(tmp_path / "model", max_position_embeddings=4096)
    code, _, err = sapo_train("config=quickstart", f"model.path={model}", *changes)
    assert code == 2 and told in err, err


def test_each_row_names_one_of_several_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_stand_in(tmp_path / "model", max_position_embeddings=4096)
    (tmp_path / "mine.yaml").write_text(
        "eval: {prompts: 2}\nmodel: {path: model}\n"
        "environments:\n  easy: {name: guess, args: {high: 5}, max_tokens: 99, workers: 1}\n"
        "  hard: {name: guess, max_tokens: 300, workers: 1}\n"
    )

    def dry_run(rows: str) -> tuple[int, str, str]:
        file = tmp_path / f"my_rows_{len([*tmp_path.iterdir()])}.py"  # one that no module of an earlier call is made of
        file.write_text(f"def rows():\n    return {rows}\n")
        given = (f"data.source={file.stem}.rows", "data.answer_column=null")
        return sapo_train("config=mine.yaml", f"model.path={model}", "dry_run=true", *given)

    several = "[{'prompt': str(n), 'environment': 'hard' if n % 4 else 'easy'} for n in range(40)]"
    code, out, err = dry_run(several)
    assert code == 0, err
    assert f"{512 + 300} tokens" in out
    found = re.search(r"rows by environment.*easy (\d+), hard (\d+)", out)
    assert found and int(found[1]) + int(found[2]) == 38, out
    code, _, err = dry_run("[{'prompt': str(n), 'environment': 'esay'} for n in range(40)]")
    assert code == 2 and re.search(
        r"row \d+: 'environment' is 'esay', must be a key of environments; did you mean 'easy'", err
    )
    code, _, err = dry_run("[{'prompt': str(n), 'environment': 'easy' if n else None} for n in range(40)]")
    assert code == 2 and "row 0: 'environment' is missing, must be a key of environments; valid: easy, hard" in err
    code, _, err = dry_run("[{'prompt': str(n), 'environ': 'easy'} for n in range(40)]")
    assert code == 2 and "the data has no column 'environment', which says which of them a row is for" in err
    (tmp_path / "mine.yaml").write_text(
        (tmp_path / "mine.yaml").read_text().replace("{name: guess, max", "{nam: guess, max")
    )
    code, _, err = dry_run(several)
    assert code == 2 and "environments.hard.nam" in err and "did you mean 'name'" in err, err
    (tmp_path / "mine.yaml").write_text("environments: {easy: guess}\n")
    code, _, err = dry_run(several)
    assert code == 2 and "environments.easy (mine.yaml): is 'guess'; write easy: {name: guess}" in err, err


def test_an_environment_alone_rewards_and_bounds_the_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_stand_in(tmp_path / "model", max_position_embeddings=4096)
    code, out, err = sapo_train("config=guess", f"model.path={model}", "dry_run=true")
    assert code == 0, err
    assert f"{128 + 96} tokens" in out
