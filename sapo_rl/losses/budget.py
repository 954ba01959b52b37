"""A gate that sets itself: the scale of SAPO's temperatures at which what the gate lets through keeps to a budget.

Experimental, and in no paper. What a gate lets through is measured by the gated KL, the mean over a step's tokens of

    w(r) (r - 1 - log r)

w is the gradient weight of each token at its temperature, the rest is the estimate k3 of KL(old || now), so that it is
at most `policy/kl_old_k3`. It falls as the temperatures rise, for every shape of the gate. Where it is above the budget
the temperatures are multiplied by the number at which it is not; else they stay as configured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sapo_rl.losses.divergence import kl_estimate
from sapo_rl.losses.gates import by_sign, gate_weight
from sapo_rl.losses.metrics import ALONE, Reduction
from sapo_rl.losses.ratio import bounded_ratio, log_ratio

LARGEST_SCALE = 64.0
"""What the temperatures are multiplied by at most: from 1, the weight halves at |r - 1| = 0.028 then."""
_HALVINGS = 40


class GatedKL:
    """The gated KL of a step's packed tokens `(T,)` as a function of the scale of the temperatures.

    Args:
        logps: log-probabilities at the update that used the token.
        old_logps: what the ratio was taken against.
        advantages: one value a sequence, repeated.
        sequence_ids: int64 in 0..num_sequences-1.
        num_sequences: number of sequences.
        tau_pos: temperature where A > 0, at scale 1.
        tau_neg: temperature elsewhere, at scale 1.
        gate: one of `GATES`.
        sides: `both`, or `one`: then only tokens that have moved with their advantage are gated, and they alone count.
        ratio_level: `token` or `sequence`.
        log_ratio_clamp: bound on |log r|.
        across: how the ranks' numbers become one.

    Example:
        >>> old, now = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0])  # the second has become e times likelier
        >>> drift = GatedKL(now, old, torch.ones(2), torch.tensor([0, 0]), 1, tau_pos=1.0, tau_neg=1.05)
        >>> [round(drift(torch.tensor(scale)).item(), 4) for scale in (1.0, 4.0)], round(drift.scale(0.1).item(), 4)
        ([0.1853, 0.0015], 1.4598)
    """

    def __init__(
        self,
        logps: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        sequence_ids: Tensor,
        num_sequences: int,
        *,
        tau_pos: float,
        tau_neg: float,
        gate: str = "sigmoid",
        sides: str = "both",
        ratio_level: str = "token",
        log_ratio_clamp: float = 20.0,
        across: Reduction = ALONE,
    ) -> None:
        self._gate, self._across = gate, across
        moved = log_ratio(logps.double(), old_logps.double(), sequence_ids, num_sequences, ratio_level)
        self._ratio, inside = bounded_ratio(moved, log_ratio_clamp)
        self._tau = by_sign(advantages.double(), tau_pos, tau_neg)
        gated = torch.where(advantages > 0, moved > 0, moved < 0) if sides == "one" else torch.ones_like(moved)
        own = kl_estimate(old_logps.double(), logps.double(), "k3")
        self._kl = own * inside * gated
        self.tokens = across.total(own.new_full((1,), len(own)))[0]
        """Tokens of all ranks, 0-d."""

    def __call__(self, scale: Tensor) -> Tensor:
        """Return the gated KL `()` float64 where both temperatures are multiplied by `scale`, `()`."""
        weight = gate_weight(self._ratio, self._tau * scale, self._gate)
        return self._across.total((weight * self._kl).sum().reshape(1))[0] / self.tokens.clamp(min=1)

    def scale(self, target: float) -> Tensor:
        """Return the scale `()` float64 in 1..`LARGEST_SCALE` at which the gated KL is `target`.

        It is 1 where it is below the target already, and the largest where it is above it everywhere.
        """
        low = least = self._kl.new_ones(())
        high = most = torch.full_like(low, LARGEST_SCALE)
        for _ in range(_HALVINGS):
            middle = (low * high).sqrt()
            above = self(middle) > target
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return torch.where(self(least) <= target, least, torch.where(self(most) > target, most, high))
