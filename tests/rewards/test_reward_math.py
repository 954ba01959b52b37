"""math-verify as a reward."""

from __future__ import annotations

import pytest

from sapo_rl.rewards import math_verify

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("reply", "answer", "value"),
    [
        ("The answer is \\boxed{0.5}.", "\\frac{1}{2}", 1.0),
        ("So it is $1+x^2$.", "x^2+1", 1.0),
        ("So it is $1+x^2$.", "The result is $x^2+1$", 1.0),
        ("\\boxed{3}", "The steps give \\boxed{3}", 1.0),
        ("it is 42", "42", 1.0),
        ("it is 41", "42", 0.0),
        ("<think>\\boxed{42}</think> it is 41", "42", 0.0),
        ("I do not know", "42", 0.0),
        ("42", None, None),
        ("42", "", None),
    ],
)
def test_math_verify(reply: str, answer: str | None, value: float | None) -> None:
    assert math_verify([reply], [answer]) == [value]
