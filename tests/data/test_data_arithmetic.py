"""Generated arithmetic."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_rl.data.arithmetic import generate, parse_args
from sapo_rl.errors import UserError


def operands(prompt: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", prompt)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(0, 3),
    st.lists(st.sampled_from("+-*"), min_size=1, max_size=3),
    st.integers(2, 5),
    st.integers(0, 9),
)
def test_answers_are_right_and_questions_as_asked_for(
    least: int, more: int, operations: list[str], terms: int, seed: int
) -> None:
    rows = generate({"digits": [least, least + more], "operations": operations, "terms": terms}, 20, seed)
    assert len({row["prompt"] for row in rows}) == len(rows) == 20
    for row in rows:
        expression = re.fullmatch(r"What is (\d+(?: [-+*] \d+)+)\?", row["prompt"])
        assert expression is not None
        assert row["expression"] == expression[1]
        assert row["answer"] == str(eval(expression[1]))
        assert set(re.findall(r"[-+*]", row["prompt"])) <= set(operations)
        assert len(operands(row["prompt"])) == terms
        assert all(least <= len(str(number)) <= least + more for number in operands(row["prompt"]))


def test_the_seed_alone_decides() -> None:
    assert generate({}, 50, 1) == generate({}, 50, 1) != generate({}, 50, 2)


def test_a_small_space_is_given_whole() -> None:
    rows = generate({"digits": 1, "operations": ["-"]}, 1000, 0)
    assert len({row["prompt"] for row in rows}) == len(rows) == 100
    assert {row["prompt"] for row in rows} == {f"What is {a} - {b}?" for a in range(10) for b in range(10)}


@pytest.mark.parametrize("count", [2000, 12000])
def test_numbers_of_few_digits_are_as_frequent_as_those_of_many(count: int) -> None:
    rows = generate({"digits": [1, 2]}, count, 0)[:200]  # of 20000 questions, few enough to draw from and too few
    short = [len(str(number)) == 1 for row in rows for number in operands(row["prompt"])]
    assert 0.4 < sum(short) / 400 < 0.55  # a little under a half: a quarter of the 200 short questions is gone


def test_a_space_beyond_64_bits() -> None:
    rows = generate({"digits": 18, "terms": 5}, 100, 0)
    assert len({row["prompt"] for row in rows}) == 100


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"digit": 2}, "takes no 'digit'; did you mean 'digits'"),
        ({"digits": 0}, r"args\.digits: must be a number from 1 to 18"),
        ({"digits": [2, 1]}, r"args\.digits"),
        ({"digits": "2"}, r"args\.digits"),
        ({"digits": [1, 2, 3]}, r"args\.digits"),
        ({"digits": True}, r"args\.digits"),
        ({"terms": 1}, r"args\.terms: must be a number from 2"),
        ({"operations": ["/"]}, r"args\.operations"),
        ({"operations": []}, r"args\.operations"),
        ({"operations": "+"}, r"args\.operations"),
    ],
)
def test_bad_arguments_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_args(args)
