"""Number guessing: the model guesses, and is told whether the number is higher or lower."""

from __future__ import annotations

import random
import re
from typing import Any

from sapo_rl.environments.registry import ENVIRONMENTS

ASKED = "I think of a whole number from {low} to {high}. Guess it with one number, nothing else."
AGAIN = "Right. Now I think of another whole number from {low} to {high}."
_NUMBER = re.compile(r"-?\d+")


@ENVIRONMENTS.register_module("guess")
class Guess:
    """A number from `low` to `high` is to be guessed; the last whole number of a reply is the guess.

    An episode that hits earns 1 in all. Before that each guess that is nearer than all before it earns a share of
    `shaping`, so that a model which never hits has something to learn from; all of them together less than `shaping`.

    Args:
        low: the smallest number.
        high: the largest.
        shaping: from 0 to below 1.
    """

    def __init__(self, low: int = 1, high: int = 100, shaping: float = 0.0) -> None:
        if low >= high:
            raise ValueError(f"low is {low}, must be below high = {high}")
        if not 0 <= shaping < 1:
            raise ValueError(f"shaping is {shaping}; must be from 0 to below 1")
        self.low, self.high, self.shaping = low, high, shaping

    def reset(self, seed: int, answer: str | int | None = None) -> None:
        """Take the row's `answer` for the number where it is one, else draw it."""
        drawn = random.Random(seed).randint(self.low, self.high)
        known = isinstance(answer, int) or (isinstance(answer, str) and _NUMBER.fullmatch(answer))
        self.number = int(answer) if known and answer is not None else drawn
        self.nearest, self.earned = self.high - self.low, 0.0

    def step(self, reply: str) -> tuple[str | None, float, bool]:
        """Compare the guess."""
        found = _NUMBER.findall(reply)
        if not found:
            return f"Guess a whole number from {self.low} to {self.high}.", 0.0, False
        guess = int(found[-1][:20])
        if guess == self.number:
            return None, 1.0 - self.earned, True
        distance, before = abs(guess - self.number), self.nearest
        self.nearest = min(before, distance)
        nearer = self.shaping * (before - self.nearest) / (self.high - self.low)
        self.earned += nearer
        return "higher" if guess < self.number else "lower", nearer, False


def tasks(split: str, count: int = 256, low: int = 1, high: int = 100) -> list[dict[str, Any]]:
    """Return `count` prompts, the same for the same split, each with a number under `answer`; a source of data.

    A prompt is a chat in which a game has just been played: small models do not do without.
    """
    rng, middle = random.Random(f"guess/{split}"), (low + high) // 2
    said = (ASKED, str(middle), "higher", str((middle + high + 1) // 2), AGAIN)
    prompt = [
        {"role": ("user", "assistant")[place % 2], "content": text.format(low=low, high=high)}
        for place, text in enumerate(said)
    ]
    return [{"prompt": prompt, "answer": str(rng.randint(low, high))} for _ in range(count)]
