"""Short answers in words. The numbers are what SQuAD's and HotpotQA's own scripts give."""

from __future__ import annotations

import pytest

from sapo_rl.rewards import squad_exact_match, squad_f1


@pytest.mark.parametrize(
    ("reply", "answer", "f1", "exact"),
    [
        ("The Eiffel-Tower!", "eiffeltower", 1.0, 1.0),  # punctuation goes, also within a word
        ("a  Chief of Protocol", "Chief of  Protocol", 1.0, 1.0),
        ("It is in Greenwich Village.", "Greenwich Village, New York City", 4 / 10, 0.0),
        ("New York New York", "New York", 2 * 2 / 6, 0.0),  # a word counts as often as both have it
        ("Yes.", "yes", 1.0, 1.0),
        ("yes, both are", "yes", 0.0, 0.0),
        ("no", "no way", 0.0, 0.0),
        ("1999", "from 1986 to 2013", 0.0, 0.0),
        ("", "x", 0.0, 0.0),
        ("the", "a", 1.0, 1.0),  # nothing but articles is left of either
        ("Thoughts: Paris? <answer>Rome</answer>", "rome", 1.0, 1.0),
        ("Rome", ["Paris", "Rome"], 1.0, 1.0),
        ("Rome", None, None, None),
        ("Rome", [], None, None),
    ],
)
def test_words_are_compared_without_what_says_nothing(
    reply: str, answer: object, f1: float | None, exact: float | None
) -> None:
    assert squad_f1([reply], [answer]) == [pytest.approx(f1)]
    assert squad_exact_match([reply], [answer]) == [exact]


def test_what_a_tool_has_said_is_no_answer() -> None:
    told = [{"role": "assistant", "content": "Rome"}, {"role": "tool", "content": "Paris"}]
    assert squad_f1([told, told[:1]], ["Paris", "Rome"]) == [0.0, 1.0]
