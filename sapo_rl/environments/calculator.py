"""A calculator that the model may call."""

from __future__ import annotations

import ast
import operator
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from sapo_rl.environments.registry import ENVIRONMENTS
from sapo_rl.errors import UserError

LONGEST = 500
"""Characters of an expression."""
LARGEST = 10**60
"""Bound on numbers on the way, and on their denominators."""
_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}
_WORDS = {"+": "Add", "-": "Subtract", "*": "Multiply by"}


@ENVIRONMENTS.register_module("calculator")
class Calculator:
    """Lets the model evaluate arithmetic; rewards are left to the reward functions."""

    def reset(self) -> None:
        """Keep nothing."""

    def calculate(self, expression: str) -> str:
        """Evaluate an arithmetic expression exactly.

        Args:
            expression: Numbers, brackets and the operators + - * / // % **, e.g. "(12 + 30) * 7".

        Returns:
            The value.
        """
        return evaluate(expression)


def evaluate(expression: str) -> str:
    """Return the exact value of an arithmetic expression, as a whole number or a decimal of at most 12 places.

    Raises:
        ValueError: it is no arithmetic, too long, or its numbers become too large.
        ZeroDivisionError: it divides by 0.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"the expression has {len(expression)} characters; at most {LONGEST}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression[:60]!r} is no arithmetic expression") from error
    value = _value(tree.body)
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.12g}" if abs(value) >= 10**12 else f"{round(float(value), 12):.15g}"


def tasks(
    split: str, count: int = 4096, operations: list[int] | None = None, digits: list[int] | None = None
) -> list[dict[str, Any]]:
    """Return `count` chains of sums, differences and products in words, the same for the same split; a source of data.

    `Begin with 4821. Multiply by 317. Subtract 90211. What is the result?`, with the exact result under `answer`.

    Args:
        split: seeds the draw.
        count: rows.
        operations: fewest and most operations in a chain, by default 3 and 5.
        digits: fewest and most digits of a number, by default 3 and 5.

    Raises:
        UserError: bounds that are none.
    """
    steps, sizes = (_bounds(*one) for one in (("operations", operations or [3, 5]), ("digits", digits or [3, 5])))
    rng = random.Random(f"calculator/{split}")

    def number() -> int:
        size = rng.randint(*sizes)
        return rng.randrange(10 ** (size - 1), 10**size)

    rows: list[dict[str, Any]] = []
    for _ in range(count):
        value = number()
        said = [f"Begin with {value}."]
        for _ in range(rng.randint(*steps)):
            sign, other = rng.choice("+-*"), number()
            value = value + other if sign == "+" else value - other if sign == "-" else value * other
            said.append(f"{_WORDS[sign]} {other}.")
        rows.append({"prompt": " ".join([*said, "What is the result?"]), "answer": str(value)})
    return rows


def _bounds(name: str, given: list[int]) -> tuple[int, int]:
    if len(given) != 2 or not 1 <= given[0] <= given[1] <= 18:
        raise UserError(f"data.args.{name}: must be [least, most] within 1 to 18, got {given}")
    return given[0], given[1]


def _value(node: ast.expr) -> Fraction:
    """The value of a part; nothing but numbers and operators is understood."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        if abs(node.value) > LARGEST:  # or infinite
            raise ValueError(f"{ast.unparse(node)[:60]} is larger than {LARGEST:.0e}")
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _power(_value(node.left), _value(node.right))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if right == 0 and isinstance(node.op, ast.Div | ast.FloorDiv | ast.Mod):
            raise ZeroDivisionError(f"'{ast.unparse(node)[:60]}' divides by 0")
        return _bounded(Fraction(_BINARY[type(node.op)](left, right)))
    raise ValueError(f"'{ast.unparse(node)[:60]}' is no arithmetic; there are numbers, brackets and + - * / // % **")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent != int(exponent) or abs(exponent) > 200:
        raise ValueError(f"the exponent {float(exponent):g} must be a whole number from -200 to 200")
    result = Fraction(1)
    for _ in range(abs(int(exponent))):  # step by step: no number becomes larger than the bound allows
        result = _bounded(result * base)
    if exponent < 0 and not result:
        raise ZeroDivisionError("0 to a negative power divides by 0")
    return result if exponent >= 0 else 1 / result


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise ValueError(f"a number has become larger than {LARGEST:.0e}")
    return value
