"""Soft gates f(r) on the importance ratio and their slopes w(r) = f'(r).

All gates are `f(r) = mass(u) / tau` with `u = tau (r - 1)`, where the slope `w = mass'(u)` is a bump of height 1 at r
= 1 and `mass(0) = 2`, so that f(1) = 2 / tau and the on-policy gradient is the policy gradient whichever gate is taken.
`sigmoid` is SAPO's (arXiv 2511.20347, equations 6 and 8); the others are those of arXiv 2602.19345.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class Gate(NamedTuple):
    """One gate's shape, as functions of `u = tau (r - 1)`.

    Example:
        >>> gate, u = GATES["sigmoid"], torch.tensor([0.0, 1.0])  # the ratio is 1, and 2 at tau 1
        >>> gate.mass(u), gate.slope(u)
        (tensor([2.0000, 2.9242]), tensor([1.0000, 0.7864]))
    """

    mass: Callable[[Tensor], Tensor]
    """tau f, differentiable; 2 at u = 0."""
    rise: Callable[[Tensor], Tensor]
    """mass(u) - 2, differentiable, precise near u = 0 as well."""
    slope: Callable[[Tensor], Tensor]
    """Its derivative w; 1 at u = 0."""
    half_width: float
    """|u| at which w = 1/2."""


def _gate(rise: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor], half_width: float) -> Gate:
    def mass(u: Tensor) -> Tensor:
        return 2 + rise(u)

    return Gate(mass, rise, slope, half_width)


# Sigmoid and softsign are spelled so that autograd's derivative keeps its relative precision in the tails:
# p (1 - p), and 1/s - u^2/s^3, would cancel there.
def _sigmoid_mass(u: Tensor) -> Tensor:
    return 4 * logsigmoid(u).exp()


def _sigmoid_rise(u: Tensor) -> Tensor:
    return torch.where(u.abs() < 1, 2 * torch.tanh(u / 2), _sigmoid_mass(u) - 2)


def _sigmoid_slope(u: Tensor) -> Tensor:
    return torch.cosh(u / 2) ** -2


GATES: dict[str, Gate] = {
    "sigmoid": Gate(
        mass=_sigmoid_mass,
        rise=_sigmoid_rise,
        slope=_sigmoid_slope,
        half_width=2 * math.acosh(math.sqrt(2)),
    ),
    "erf": _gate(
        rise=lambda u: math.sqrt(math.pi / 2) * torch.erf(u / math.sqrt(2)),
        slope=lambda u: torch.exp(-(u**2) / 2),
        half_width=math.sqrt(2 * math.log(2)),
    ),
    "arctan": _gate(
        rise=torch.atan,
        slope=lambda u: 1 / (1 + u**2),
        half_width=1.0,
    ),
    "softsign": _gate(
        rise=lambda u: torch.sin(torch.atan(u)),  # u / sqrt(1 + u^2)
        slope=lambda u: (1 + u**2) ** -1.5,
        half_width=math.sqrt(2 ** (2 / 3) - 1),
    ),
}
"""Gates by name."""


def find_gate(name: str) -> Gate:
    """Return the gate called `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in GATES:
        raise ValueError(f"unknown gate '{name}'; valid: {', '.join(GATES)}")
    return GATES[name]


def by_sign(advantages: Tensor, positive: float, other: float) -> Tensor:
    """Return a setting of each token, such as tau, shaped as `advantages`: `positive` where they are above 0."""
    return torch.full_like(advantages, other).masked_fill(advantages > 0, positive)


def gate_value(ratio: Tensor, tau: Tensor, gate: str = "sigmoid") -> Tensor:
    """Return f(r), shaped as `ratio`; for the sigmoid `4 / tau * sigmoid(tau (r - 1))` (equation 6)."""
    return find_gate(gate).mass(tau * (ratio - 1)) / tau


def gate_rise(ratio: Tensor, tau: Tensor, gate: str = "sigmoid") -> Tensor:
    """Return f(r) - f(1), shaped as `ratio`: 0 at r = 1, and as precise near it as r - 1 itself."""
    return find_gate(gate).rise(tau * (ratio - 1)) / tau


def gate_weight(ratio: Tensor, tau: Tensor, gate: str = "sigmoid") -> Tensor:
    """Return w(r) = f'(r), shaped as `ratio`; for the sigmoid `4 p (1 - p) = sech^2(tau (r - 1) / 2)` (equation 8)."""
    return find_gate(gate).slope(tau * (ratio - 1))


def half_weight_distance(tau: float, gate: str = "sigmoid") -> float:
    """Return the |r - 1| at which the gradient's weight is 1/2: 1.763 / tau for the sigmoid."""
    return find_gate(gate).half_width / tau
