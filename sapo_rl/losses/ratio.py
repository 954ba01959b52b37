"""The importance ratio between the policy now and the policy that wrote the rollouts."""

from __future__ import annotations

import torch
from torch import Tensor

from sapo_rl.losses.aggregation import sequence_mean

RATIO_LEVELS = ("token", "sequence")
"""Whose ratio weighs a token: its own, or the geometric mean over its sequence."""


def log_ratio(logps: Tensor, old_logps: Tensor, sequence_ids: Tensor, num_sequences: int, level: str) -> Tensor:
    """Return `(T,)` log ratios, differentiable in `logps`.

    `token`: log r_t = logps - old_logps (SAPO, equations 1-2). `sequence`: log s = mean over the sequence of log r_t,
    repeated for each of its tokens (GSPO's ratio; SAPO, equation 23).

    Raises:
        ValueError: an unknown level.
    """
    if level not in RATIO_LEVELS:
        raise ValueError(f"unknown ratio_level '{level}'; valid: {', '.join(RATIO_LEVELS)}")
    by_token = logps - old_logps.detach()
    if level == "token":
        return by_token
    return sequence_mean(by_token, sequence_ids, num_sequences)[sequence_ids]


def bounded_ratio(log_ratios: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Return the ratio exp(clamp(log_ratios, -bound, bound)) and 1 where the clamp let it through, else 0, both `(T,)`.

    Outside the bound the ratio carries no gradient. With the default bound of 20 that is harmless, since
    SAPO's weight is 0 at e^20 and the ratio 2e-9 at e^-20; unbounded, exp overflows to inf and the gradient becomes
    NaN.
    """
    inside = (log_ratios.detach().abs() <= bound).to(log_ratios.dtype)
    return log_ratios.clamp(-bound, bound).exp(), inside


def check_dual_clip(dual_clip: float | None) -> None:
    """Raise ValueError unless a bound on the ratio of negative advantages is above 1, or None."""
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1 or null, found {dual_clip}")


def moved_with(log_ratios: Tensor, advantages: Tensor) -> Tensor:
    """Return which tokens `(T,)` have moved with their advantage: A > 0 and r > 1, or A < 0 and r < 1."""
    return torch.where(advantages > 0, log_ratios > 0, (advantages < 0) & (log_ratios < 0))
