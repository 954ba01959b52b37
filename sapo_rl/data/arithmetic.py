"""Generated sums, differences and products: `What is 3 - 8?`, answer `-5`."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import Any

from sapo_rl.errors import UserError, did_you_mean


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
    def low(self) -> int:
        """Smallest number."""
        least = self.digits if isinstance(self.digits, int) else self.digits[0]
        return 0 if least == 1 else 10 ** (least - 1)

    @property
    def high(self) -> int:
        """One more than the largest number."""
        return 10 ** (self.digits if isinstance(self.digits, int) else self.digits[1])

    @property
    def space(self) -> int:
        """How many different questions there are."""
        return (self.high - self.low) ** self.terms * len(self.operations) ** (self.terms - 1)


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
    """Return `count` different questions in random order, all there are where there are fewer: `prompt` and `answer`.

    Every question of the space is equally likely, so most of `digits: [1, 3]` have three digits.
    """
    task = parse_args(args)
    rng = random.Random(f"arithmetic/{seed}")
    if task.space <= 2 * count:
        chosen = rng.sample(range(task.space), min(count, task.space))
    else:  # the space may be far larger than a range can be sampled from
        drawn: dict[int, None] = {}
        while len(drawn) < count:
            drawn[rng.randrange(task.space)] = None
        chosen = list(drawn)
    return [_row(task, number) for number in chosen]


def _row(task: Arithmetic, number: int) -> dict[str, Any]:
    """The question with this number: its operands and operations are the digits of a mixed-radix number."""
    operands, signs = [], []
    for _ in range(task.terms):
        number, offset = divmod(number, task.high - task.low)
        operands.append(task.low + offset)
    for _ in range(task.terms - 1):
        number, offset = divmod(number, len(task.operations))
        signs.append(task.operations[offset])
    words = [str(operands[0])]
    total, product = 0, operands[0]
    for sign, operand in zip(signs, operands[1:], strict=True):
        words += [sign, str(operand)]
        if sign == "*":
            product *= operand
        else:
            total, product = total + product, operand if sign == "+" else -operand
    return {"prompt": f"What is {' '.join(words)}?", "answer": str(total + product)}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
