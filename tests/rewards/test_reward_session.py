"""Functions of this process, called by workers."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rewards.groups import group

from sapo_rl.config import RewardConfig, RewardFunctionConfig
from sapo_rl.errors import UserError
from sapo_rl.rewards import RewardPool, session

pytestmark = pytest.mark.usefixtures("forked_workers")

Score = Callable[..., dict[str, list[float | None]]]


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch) -> Score:
    """Scores texts by functions of this process, in a pool whose workers call them; returns rewards by function."""

    def scored(texts: list[str], timeout: float = 30.0, **functions: Any) -> dict[str, list[float | None]]:
        config = RewardConfig(
            {
                name: RewardFunctionConfig(
                    session.path_to(one), args={"session_function": name, "factor": 2.0}, timeout=timeout
                )
                for name, one in functions.items()
            }
        )
        with session.SessionFunctions(functions) as variables, monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            with RewardPool(config) as pool:
                (scored,) = pool.score([group(0, texts, answer="1")]).groups
        return {name: [sample.rewards[name] for sample in scored.samples] for name in functions}

    return scored


def test_a_function_gets_what_any_reward_function_gets_and_its_settings(score: Score) -> None:
    seen: list[dict[str, Any]] = []

    def mine(completions: list[str], prompts: list[str], answer: list[str], factor: float) -> list[float | None]:
        seen.append({"prompts": prompts, "answer": answer, "process": os.getpid()})
        return [None if text == "none" else factor * len(text) for text in completions]

    assert score(["a", "none", "abc"], mine=mine) == {"mine": [2.0, None, 6.0]}
    assert seen == [{"prompts": ["Q?"] * 3, "answer": ["1"] * 3, "process": os.getpid()}]


def test_coroutine_functions_keep_one_loop_and_functions_are_called_by_their_names(score: Score) -> None:
    loops = set()

    async def one(completions: list[str], **columns: Any) -> list[float]:
        loops.add(asyncio.get_running_loop())
        await asyncio.sleep(0.01)
        return [1.0 for _ in completions]

    async def two(completions: list[str], **columns: Any) -> list[float]:
        loops.add(asyncio.get_running_loop())
        return [2.0 for _ in completions]

    assert score(["a", "b"], one=one, two=two) == {"one": [1.0, 1.0], "two": [2.0, 2.0]}
    assert len(loops) == 1


def test_what_a_function_raises_is_told_with_its_line(score: Score) -> None:
    def fails(completions: list[str], **columns: Any) -> list[float]:
        raise ValueError("no such thing")

    with pytest.raises(UserError, match=rf"'fails' .*ValueError: no such thing \({__file__}:\d+\)"):
        score(["a"], fails=fails)


def test_a_function_that_hangs_is_given_up(score: Score) -> None:
    import threading

    end = threading.Event()

    def hangs(completions: list[str], **columns: Any) -> list[float]:
        end.wait(60)
        return [0.0 for _ in completions]

    try:
        with pytest.raises(UserError, match=r"'hangs' .*longer than"):
            score(["a"], timeout=0.5, hangs=hangs)
    finally:
        end.set()


def test_without_its_session_a_function_says_where_it_was() -> None:
    path = session.path_to(lambda completions, **columns: [])
    config = RewardConfig({"mine": RewardFunctionConfig(path, args={"session_function": "mine"})})
    with RewardPool(config) as pool, pytest.raises(UserError, match=r"the Python session that started the run"):
        pool.score([group(0, ["a"])])


def test_nothing_is_left_of_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with session.SessionFunctions({"mine": lambda completions, **columns: []}) as variables:
        (folder,) = tmp_path.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert variables == {session.VARIABLE: str(folder / "session")}
    assert list(tmp_path.iterdir()) == []
    with session.SessionFunctions({}) as variables:
        assert variables == {}
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_folder_too_deep_for_a_socket_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    told = r"^TMPDIR: '.*d{100}.*' has more than 107 bytes"
    with pytest.raises(UserError, match=told), session.SessionFunctions({"one": lambda completions: [0.0]}):
        pass
    assert list(deep.iterdir()) == []
