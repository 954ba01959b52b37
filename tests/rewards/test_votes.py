"""Which replies of a prompt have the same answer."""

from __future__ import annotations

from typing import Any

import pytest

from sapo_rl.config import RewardFunctionConfig
from sapo_rl.rewards.lookup import resolve
from sapo_rl.rewards.registry import VOTERS, voter_of


def votes(name: str, replies: list[str], **args: Any) -> list[float]:
    cfg = voter_of(RewardFunctionConfig(name, args=args))
    assert cfg is not None and cfg.scope == "group" and cfg.args == args
    return resolve(cfg.function)(completions=replies, **args)


@pytest.mark.parametrize(
    ("name", "replies", "expected"),
    [
        ("numeric_answer", ["It is 3.", "1,000", "3.0", "none", "1e3"], [1, 2, 1, 0, 2]),
        ("numeric_digits", ["12", "so 12.", "-12"], [1, 1, 2]),
        ("exact_match", [" a", "A", "a", ""], [1, 2, 1, 3]),
        ("squad_f1", ["The tower", "tower!", "a house", "the"], [1, 1, 2, 0]),
        ("squad_exact_match", ["<answer>Rome</answer>", "rome"], [1, 1]),
        ("reasoning_gym", ["<answer>5</answer>", "<answer>6</answer>", "It is \\boxed{5}"], [1, 2, 1]),
    ],
)
def test_replies_with_the_same_answer_have_the_same_number(
    name: str, replies: list[str], expected: list[float]
) -> None:
    assert votes(name, replies) == expected


def test_settings_of_the_function_count_for_its_answers() -> None:
    assert votes("exact_match", [" a", "A", "a"], ignore_case=True) == [1, 1, 1]
    assert votes("exact_match", ["<a>x</a>", "x", "<a>x</a>!"], tag="a") == [1, 0, 1]


def test_expressions_that_are_equal_mathematically_are_one_answer() -> None:
    replies = [
        "It is $\\frac{1}{2}$",
        "\\boxed{0.5}",
        "no idea",
        "$\\frac{2}{4}$.",
        "\\boxed{3}",
        "<think>1</think>\\boxed{1/2}",
    ]
    assert votes("math_verify", replies) == [1, 1, 0, 1, 2, 1]


def test_there_are_none_where_nothing_is_said_in_a_reply() -> None:
    assert voter_of(RewardFunctionConfig("code")) is None and voter_of(RewardFunctionConfig("my.own")) is None
    assert set(VOTERS) >= {"numeric_answer", "math_verify"}
