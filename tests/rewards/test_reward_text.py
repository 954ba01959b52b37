"""The verifiers that read nothing but the reply's text."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest

from sapo_rl.errors import UserError
from sapo_rl.rewards import exact_match, format_tags, length_limit, numeric_answer, numeric_digits, regex
from sapo_rl.rewards.text import final_answer, last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 - 8 = -5", "-5"),
        ("3 - 8 = \u22125.", "-5"),
        ("so 5-3", "3"),
        ("(2)-3", "3"),
        ("x=-5", "-5"),
        ("It costs $1,234.50!", "1234.5"),
        ("-$5", "-5"),
        ("1\u202f234\u202f567 people", "1234567"),
        ("1,2,3", "3"),
        ("12,3456", "3456"),
        ("1.5e-3", "0.0015"),
        (".5", "0.5"),
        ("**+7**", "7"),
        ("\\boxed{42}", "42"),
        ("25 m2", "25"),
        ("答案是-5", "-5"),
        ("0.1000", "0.1"),
    ],
)
def test_last_number_reads_what_people_and_models_write(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "½", "x2", "-", "."])
def test_last_number_finds_none(text: str) -> None:
    assert last_number(text) is None


def test_numeric_answer_compares_the_last_numbers() -> None:
    replies = ["3 - 8 = -5", "-5, or is it 4?", "no idea", "-5.00", "5"]
    assert numeric_answer(replies, ["-5"] * 5) == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert numeric_answer(["... 72"], ["She sold 48 + 24 = 72.\n#### 72"]) == [1.0]
    assert numeric_answer(["7"], [None]) == [None]
    assert numeric_answer(["7"], [7]) == [1.0]


def test_numeric_answer_is_exact_unless_a_tolerance_is_given() -> None:
    assert numeric_answer(["0.30000000000000004"], ["0.3"]) == [0.0]
    assert numeric_answer(["-1" + "0" * 40 + "1"], ["-1" + "0" * 40 + "2"]) == [0.0]
    assert numeric_answer(["0.34", "0.36"], ["0.3", "0.3"], tolerance=0.05) == [1.0, 0.0]
    assert numeric_answer(["9e999"], ["3"], tolerance=0.1) == [0.0]


def test_numbers_are_exact_whatever_precision_another_package_sets() -> None:
    with localcontext(prec=3):  # reasoning-gym leaves the like behind
        assert numeric_answer(["-1234"], ["-1233"]) == [0.0]
        assert numeric_answer(["-1234"], ["-1232"], tolerance=1.5) == [0.0]
        assert numeric_digits(["1234"], ["1233"]) == [4 / 5]


def test_numeric_answer_refuses_an_answer_without_a_number() -> None:
    with pytest.raises(ValueError, match="'seven' holds no number"):
        numeric_answer(["7"], ["seven"])


@pytest.mark.parametrize(
    ("reply", "answer", "right", "of"),
    [
        ("583 - 799 = -216", "-216", 4, 4),
        ("-217", "-216", 3, 4),
        ("216", "-216", 3, 4),
        ("1216", "-216", 3, 5),
        ("16", "-216", 2, 4),
        ("-9", "19", 1, 3),
        ("10", "100", 2, 4),
        ("0", "-0", 2, 2),
        ("7.0", "7", 2, 2),
        ("7.5", "7", 0, 2),
        ("seven", "7", 0, 2),
        ("1" + "0" * 40, "10", 2, 42),
        ("9e999", "9", 1, 1001),
        ("-1" + "0" * 40 + "1", "-1" + "0" * 40 + "2", 42, 43),
    ],
)
def test_numeric_digits_counts_digits_at_their_places(reply: str, answer: str, right: int, of: int) -> None:
    assert numeric_digits([reply], [answer]) == [right / of]


def test_numeric_digits_is_for_whole_numbers() -> None:
    assert numeric_digits(["7"], [None]) == [None]
    for answer in ("7.5", "seven"):
        with pytest.raises(ValueError, match=f"'{answer}' is no whole number"):
            numeric_digits(["7"], [answer])


def test_exact_match() -> None:
    assert exact_match([" Paris\n", "paris", "It is Paris"], ["Paris"] * 3) == [1.0, 0.0, 0.0]
    assert exact_match(["paris"], ["Paris"], ignore_case=True) == [1.0]
    assert exact_match(["Paris"], [None]) == [None]
    tagged = ["<a>x</a> <a> Paris </a>", "Paris"]
    assert exact_match(tagged, ["Paris"] * 2, tag="a") == [1.0, 0.0]


def test_chat_completions_are_read_by_their_content() -> None:
    assert exact_match([[{"role": "assistant", "content": "Paris"}]], ["Paris"]) == [1.0]


def test_regex_searches_or_matches_all() -> None:
    assert regex(["the answer is 12.", "12", "twelve"], pattern=r"\d+") == [1.0, 1.0, 0.0]
    assert regex(["the answer is 12.", "12"], pattern=r"\d+", full=True) == [0.0, 1.0]
    with pytest.raises(UserError, match=r"'\(' is no regular expression"):
        regex([], pattern="(")


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" <think>\na\n</think>\n\n<answer>b</answer>\n", 1.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer> done", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("b", 0.0),
    ],
)
def test_format_tags(reply: str, value: float) -> None:
    assert format_tags([reply]) == [value]


def test_format_tags_of_ones_own_with_text_after_them() -> None:
    assert format_tags(["<think>a</think> b"], tags=["think"], trailing=True) == [1.0]
    assert format_tags(["<think>a</think> b"], tags=["think"]) == [0.0]
    with pytest.raises(UserError, match="names without brackets"):
        format_tags([], tags=["<think>"])


def test_length_limit_is_the_soft_overlong_punishment() -> None:
    ids = [[0] * n for n in (5, 6, 8, 10, 11)]
    assert length_limit([""] * 5, ids, max_tokens=10, soft=4) == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert length_limit([""] * 2, ids[3:], max_tokens=10) == [0.0, -1.0]
    papers = [[0] * n for n in (16384, 17408, 18432, 20480, 20481)]
    assert length_limit([""] * 5, papers, max_tokens=20480, soft=4096) == [0.0, -0.25, -0.5, -1.0, -1.0]
    with pytest.raises(UserError, match="soft <= max_tokens"):
        length_limit([], [], max_tokens=3, soft=4)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<answer>1</answer> or <answer> 2 </answer>", "2"),
        ("I think \\boxed{3} or \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("<think>it is \\boxed{4}</think>\n 5 ", "5"),
        ("  6 ", "6"),
        ("\\boxed{7", "\\boxed{7"),
    ],
)
def test_final_answer(reply: str, answer: str) -> None:
    assert final_answer(reply) == answer
