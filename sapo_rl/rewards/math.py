"""Symbolic comparison of mathematical answers by the package math-verify."""

from __future__ import annotations

import logging
from typing import Any

from sapo_rl.rewards.registry import REWARD_FUNCTIONS, Completion
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


def _score(reply: str, expected: str) -> float | None:
    from math_verify import parse, verify

    # It warns that its timeouts, which work by signals, are off. The pool's killable worker has its own.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    marked = any(mark in expected for mark in ("$", "\\boxed", "\\(", "\\["))
    wanted = parse(expected if marked else f"${expected}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if not wanted:
        return None
    found = parse(reply.rpartition("</think>")[2], parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return float(verify(wanted, found, timeout_seconds=None))
