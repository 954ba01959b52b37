"""What is told of an engine class of the user's own that cannot be one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inside import sapo_train

from sapo_rl.config.engine import EngineConfig
from sapo_rl.engines import own
from sapo_rl.errors import UserError

MODULE = """
class Whole:
    def __init__(self, settings, *, threads: int = 1): ...
    def start(self): ...
    def wait_ready(self): ...
    def submit(self, requests, sampling): ...
    def recover(self): ...
    def score(self, token_ids): ...
    def sleep(self): ...
    def close(self): ...
    @staticmethod
    def transport(): ...

class Dumb(Whole):
    submit = None

def make(settings): ...
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "engines_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("engines_of_mine", None)


def test_a_class_with_all_methods_is_found_and_the_built_in_is_none() -> None:
    found = own.find(EngineConfig("engines_of_mine.Whole", {"threads": 2}))
    assert isinstance(found, type) and found.__name__ == "Whole"
    assert own.find(EngineConfig()) is None


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("Dumb", {}, r"rollout.engine.name: 'engines_of_mine.Dumb' has no method 'submit'; needed: start, wait_ready"),
        ("make", {}, r"rollout.engine.name: 'engines_of_mine.make' is a function, not a class"),
        ("Hole", {}, r"rollout.engine.name: engine 'engines_of_mine.Hole': .* has no 'Hole'; did you mean 'Whole'"),
        ("Whole", {"thread": 2}, r"rollout.engine.args.thread: unknown argument; did you mean 'threads'"),
        ("Whole", {"threads": "2"}, r"rollout.engine.args.threads: '2' is a str, must be int"),
    ],
)
def test_mistakes_are_named_with_their_key(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        own.find(EngineConfig(f"engines_of_mine.{name}", args))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+rollout.engine.args={threads: 2}"], "rollout.engine.args (command line): are for an engine of your own"),
        (["rollout.engine.name=engines_of_mine.Nope"], "'engines_of_mine.Nope'"),
        (
            ["rollout.engine.name=engines_of_mine.Whole", "rollout.servers=[127.0.0.1:8000]"],
            "rollout.engine.name (command line): 'engines_of_mine.Whole' writes beside the trainer",
        ),
        (
            ["rollout.engine.name=engines_of_mine.Whole", "rollout.transport=file"],
            "rollout.transport (command line): 'file' is for vLLM; 'engines_of_mine.Whole' brings its own: set auto",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_read(
    overrides: list[str], message: str, tiny_model: Path
) -> None:
    code, _, told = sapo_train("config=quickstart", f"model.path={tiny_model}", *overrides, "dry_run=true")
    assert code == 2 and message in told, told
