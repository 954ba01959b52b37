"""Generated sums, differences and products: `What is 3 - 8?`, expression `3 - 8`, answer `-5`."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from itertools import product
from math import prod
from typing import Any, TypeAlias

from sapo_rl.errors import UserError, did_you_mean

Question: TypeAlias = tuple[tuple[int, ...], tuple[str, ...]]
"""Numbers, and the operations between them."""


@dataclass(frozen=True)
class Arithmetic:
    """What `data.args` may say."""

    digits: int | list[int] = 1
    """Digits of the numbers: `2` is 10 to 99, `1` is 0 to 9, `[1, 3]` is 0 to 999."""
    operations: tuple[str, ...] = ("+", "-")
    """Drawn from these; `*` binds tighter."""
    terms: int = 2
    """Numbers in a question."""

    @property
    def bounds(self) -> tuple[int, int]:
        """Fewest and most digits."""
        return (self.digits, self.digits) if isinstance(self.digits, int) else (self.digits[0], self.digits[1])

    @property
    def low(self) -> int:
        """Smallest number."""
        return _range(self.bounds[0])[0]

    @property
    def high(self) -> int:
        """One more than the largest number."""
        return _range(self.bounds[1])[1]

    @property
    def space(self) -> int:
        """How many different questions there are."""
        return (self.high - self.low) ** self.terms * len(self.operations) ** (self.terms - 1)

    def likelihood(self, operands: tuple[int, ...]) -> float:
        """How often these numbers are drawn, up to a factor."""
        return 1 / prod(end - start for start, end in (_range(len(str(operand))) for operand in operands))


def parse_args(args: dict[str, Any]) -> Arithmetic:
    """Return the checked arguments.

    Raises:
        UserError: an unknown name, or a value out of range.
    """
    known = [field.name for field in fields(Arithmetic)]
    for key in args:
        if key not in known:
            raise UserError(f"data.args: arithmetic takes no '{key}'; {did_you_mean(key, known)}")
    digits, terms = args.get("digits", 1), args.get("terms", 2)
    bounds = digits if isinstance(digits, list) else [digits, digits]
    if len(bounds) != 2 or not all(_is_int(d) for d in bounds) or not 1 <= bounds[0] <= bounds[1] <= 18:
        raise UserError(f"data.args.digits: must be a number from 1 to 18 or [least, most], got {digits!r}")
    if not _is_int(terms) or not 2 <= terms <= 100:
        raise UserError(f"data.args.terms: must be a number from 2 to 100, got {terms!r}")
    operations = args.get("operations", ["+", "-"])
    if not isinstance(operations, list) or not operations or any(op not in ("+", "-", "*") for op in operations):
        raise UserError(f"data.args.operations: must be a list of '+', '-' and '*', got {operations!r}")
    return Arithmetic(digits, tuple(dict.fromkeys(operations)), terms)


def generate(args: dict[str, Any], count: int, seed: int) -> list[dict[str, Any]]:
    """Return `count` different questions in random order, all there are where there are fewer.

    A row has `prompt`, `expression` and `answer`. The digits of each number are drawn first, evenly, then the number:
    short numbers are as frequent as long ones.
    """
    task = parse_args(args)
    rng = random.Random(f"arithmetic/{seed}")
    if task.space <= 2 * count:
        numbers = range(task.low, task.high)
        every = product(product(numbers, repeat=task.terms), product(task.operations, repeat=task.terms - 1))
        # An exponential clock for each question, as fast as it is likely: they ring in the order of draws.
        drawn = sorted(every, key=lambda question: rng.expovariate(task.likelihood(question[0])))[:count]
    else:
        found: dict[Question, None] = {}
        while len(found) < count:
            found[_draw(task, rng)] = None
        drawn = list(found)
    return [_row(*question) for question in drawn]


def _draw(task: Arithmetic, rng: random.Random) -> Question:
    operands = [rng.randrange(*_range(rng.randint(*task.bounds))) for _ in range(task.terms)]
    return tuple(operands), tuple(rng.choices(task.operations, k=task.terms - 1))


def _row(operands: tuple[int, ...], signs: tuple[str, ...]) -> dict[str, Any]:
    words = [str(operands[0])]
    total, factor = 0, operands[0]
    for sign, operand in zip(signs, operands[1:], strict=True):
        words += [sign, str(operand)]
        if sign == "*":
            factor *= operand
        else:
            total, factor = total + factor, operand if sign == "+" else -operand
    expression = " ".join(words)
    return {"prompt": f"What is {expression}?", "expression": expression, "answer": str(total + factor)}


def _range(digits: int) -> tuple[int, int]:
    """The numbers of so many digits: from, and up to but without."""
    return (0 if digits == 1 else 10 ** (digits - 1)), 10**digits


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
