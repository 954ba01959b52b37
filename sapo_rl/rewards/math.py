"""Symbolic comparison of mathematical answers by the package math-verify."""

from __future__ import annotations

import logging
from typing import Any

from sapo_rl.rewards.registry import REWARD_FUNCTIONS, VOTERS, Completion
from sapo_rl.rewards.text import text_of


@REWARD_FUNCTIONS.register_module("math_verify")
def math_verify(completions: list[Completion], answer: list[Any], **columns: list[Any]) -> list[float | None]:
    r"""1 where the reply's final expression equals the answer mathematically (`0.5` and `\frac{1}{2}`).

    The answer is an expression, or a text that holds it in `$...$`, `\(...\)` or `\boxed{}`. What precedes the reply's
    last `</think>` is not read. None where the answer is empty or cannot be parsed; 0 where the reply cannot.
    """
    return [
        None if expected is None else _score(text_of(completion), str(expected))
        for completion, expected in zip(completions, answer, strict=True)
    ]


@VOTERS.register_module("math_verify")
def math_votes(completions: list[Completion], **columns: list[Any]) -> list[float]:
    """Number the replies by their final expression; those that are equal mathematically have the same number."""
    from math_verify import verify

    first: list[Any] = []
    votes: list[float] = []
    for completion in completions:
        found = _final(text_of(completion))
        same = (n for n, other in enumerate(first, 1) if verify(other, found, timeout_seconds=None))
        number = next(same, 0) if found else 0
        if found and not number:
            first.append(found)
            number = len(first)
        votes.append(float(number))
    return votes


def _score(reply: str, expected: str) -> float | None:
    from math_verify import parse, verify

    found = _final(reply)
    marked = any(mark in expected for mark in ("$", "\\boxed", "\\(", "\\["))
    wanted = parse(expected if marked else f"${expected}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return float(verify(wanted, found, timeout_seconds=None)) if wanted else None


def _final(reply: str) -> list[Any]:
    """What a reply's final expression can be read as; nothing where it has none."""
    from math_verify import parse

    # It warns that its timeouts, which work by signals, are off. The pool's killable worker has its own.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse(reply.rpartition("</think>")[2], parsing_timeout=None)  # pyright: ignore[reportArgumentType]
