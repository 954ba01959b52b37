"""One call of a reward function: what it is given, and which results are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from samples import one_row

from sapo_rl.errors.own_code import readable
from sapo_rl.rewards.runner.scoring import ScoreError, call_arguments, evaluate
from sapo_rl.rewards.runner.sheet import Place
from sapo_rl.types import Prompt


def group(content: Any, texts: list[str], **columns: Any) -> list[Place]:
    prompt = Prompt(7, [1, 2], content, columns)
    return [Place(prompt, one_row([len(text)], text=text)) for text in texts]


def test_text_prompts_are_passed_as_trl_passes_them() -> None:
    arguments = call_arguments(group("Q?", ["a", "bb"], answer="A", level=3))
    assert arguments == {
        "prompts": ["Q?", "Q?"],
        "completions": ["a", "bb"],
        "completion_ids": [[1], [2]],
        "answer": ["A", "A"],
        "level": [3, 3],
    }


def test_chats_are_passed_as_trl_passes_them() -> None:
    chat = [{"role": "user", "content": "Q?"}]
    arguments = call_arguments(group(chat, ["a", "b"])[1:])
    assert arguments["prompts"] == [chat]
    assert arguments["completions"] == [[{"role": "assistant", "content": "b"}]]


def test_settings_go_before_columns_and_unnamed_arguments_are_left_out() -> None:
    def narrow(completions: list[str], answer: list[str]) -> list[float]:
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    def wide(completions: list[str], scale: float, **columns: Any) -> list[float]:
        assert set(columns) == {"prompts", "completion_ids", "answer"}
        return [scale for _ in completions]

    arguments = call_arguments(group("Q", ["a", "b"], answer="a", scale=9))
    assert evaluate(narrow, arguments, {}) == [1.0, 0.0]
    assert evaluate(wide, arguments, {"scale": 2.5}) == [2.5, 2.5]


def test_coroutines_and_other_numbers_are_understood() -> None:
    async def later(completions: list[str]) -> list[float | None]:
        return [1, None]

    arguments = call_arguments(group("Q", ["a", "b"]))
    assert evaluate(later, arguments, {}) == [1.0, None]
    assert evaluate(lambda completions: np.array([0.5, 2.0], dtype=np.float32), arguments, {}) == [0.5, 2.0]
    assert evaluate(lambda completions: torch.tensor([0.5, 2.0]), arguments, {}) == [0.5, 2.0]
    assert evaluate(lambda completions: [True, np.bool_(False)], arguments, {}) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "returned 1 values for 2 completions"),
        (1.0, "returned a float, must be a list of 2"),
        (None, "returned a NoneType"),
        ("ab", "returned a str"),
        ({1.0, 2.0}, "returned a set, must be a list of 2"),
        ({1.0: "a", 2.0: "b"}.keys(), "returned a dict_keys, must be a list of 2"),
        ([1.0, math.nan], "returned nan for a sample"),
        ([1.0, math.inf], "returned inf for a sample"),
        ([1.0, "1.0"], "returned '1.0' for a sample"),
        ([1.0, [2.0]], r"returned \[2.0\] for a sample"),
        ([1.0, 1e308], r"returned 1e\+308 for a sample"),
        ([1.0, 10**400], "returned 1000000000"),
        (torch.tensor(1.0), "returned a Tensor: TypeError: iteration over a 0-d tensor"),
        ((1.0 / n for n in (1, 0)), "returned a generator: ZeroDivisionError: float division by zero"),
    ],
)
def test_unusable_results_are_refused(result: Any, message: str) -> None:
    with pytest.raises(ScoreError, match=message + r".*test_reward_scoring\.py:\d+"):
        evaluate(lambda completions: result, call_arguments(group("Q", ["a", "b"])), {})


def test_exceptions_are_told_with_the_line_of_the_users_function() -> None:
    def raises(completions: list[str]) -> list[float]:
        return [math.sqrt(float(text)) for text in completions]

    line = raises.__code__.co_firstlineno + 1
    with pytest.raises(ScoreError, match=rf"^ValueError: could not convert.*test_reward_scoring\.py:{line}\)$"):
        evaluate(raises, call_arguments(group("Q", ["4", "x"])), {})


def test_a_missing_column_and_an_exit_are_failures_too() -> None:
    def wants(completions: list[str], solution: list[str]) -> list[float]:
        return []

    def leaves(completions: list[str]) -> list[float]:
        raise SystemExit(3)

    arguments = call_arguments(group("Q", ["a"]))
    with pytest.raises(ScoreError, match="missing 1 required positional argument: 'solution'"):
        evaluate(wants, arguments, {})
    with pytest.raises(ScoreError, match="SystemExit: 3"):
        evaluate(leaves, arguments, {})


@pytest.mark.parametrize("change", ["completions.pop()", "completions.append('c')", "completions.clear()"])
def test_completions_are_counted_before_the_function_can_change_them(change: str) -> None:
    def mutates(completions: list[str]) -> list[float]:
        exec(change)
        return [1.0 for _ in completions]

    with pytest.raises(ScoreError, match=r"returned \d values for 2 completions"):
        evaluate(mutates, call_arguments(group("Q", ["a", "b"])), {})


class Wordless(Exception):
    """An exception whose text cannot be read."""

    def __str__(self) -> str:
        raise KeyError("text")


class Odd:
    """A value that can neither be shown nor be made a number."""

    def __repr__(self) -> str:
        raise KeyboardInterrupt

    def __float__(self) -> float:
        raise RuntimeError("meta")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), "^KeyboardInterrupt "),
        (GeneratorExit("bye"), "^GeneratorExit: bye "),
        (Wordless(), "^Wordless: its __str__ raises KeyError "),
    ],
)
def test_whatever_is_raised_is_named(error: BaseException, message: str) -> None:
    def raises(completions: list[str]) -> list[float]:
        raise error

    with pytest.raises(ScoreError, match=message + r".*test_reward_scoring\.py:\d+"):
        evaluate(raises, call_arguments(group("Q", ["a"])), {})


def test_a_value_that_cannot_be_shown_is_named_by_its_type() -> None:
    with pytest.raises(ScoreError, match=r"returned a Odd .its __repr__: KeyboardInterrupt. for a sample"):
        evaluate(lambda completions: [Odd()], call_arguments(group("Q", ["a"])), {})


def test_long_messages_keep_both_ends_and_nothing_that_a_terminal_obeys() -> None:
    assert readable("ValueError: plain\n\u2026 \u00e9\u4e2d") == "ValueError: plain\n\u2026 \u00e9\u4e2d"
    assert readable("a\x1b[31mb\rc\ud800") == r"a\x1b[31mb\rc\ud800"
    short = readable("begin " + "x" * 10**6 + " end")
    assert len(short) < 1100 and short.startswith("begin") and short.endswith(" end") and "[...]" in short
    lines = readable("\n".join(str(number) for number in range(200))).splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("0", "199", 13)
