"""Correction of the mismatch between the engine that sampled the tokens and the trainer that scores them.

vLLM and the trainer disagree slightly on the same weights. The factors here multiply the policy term alone, never the
KL penalty, and carry no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sapo_rl.losses.aggregation import sequence_mean

CORRECTION_MODES = ("none", "token_truncate", "token_mask", "sequence_mask")
"""No correction, or one of three."""
BOUND = 20.0  # on the log ratio, so that exp stays finite in float32


def mismatch_factor(
    old_logps: Tensor,
    rollout_logps: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    mode: str,
    low: float,
    high: float,
) -> Tensor:
    """Return the factor `(T,)` on the policy term; rho = exp(old_logps - rollout_logps), the trainer's over vLLM's.

    * `token_truncate`: min(rho, high), truncated importance sampling;
    * `token_mask`: rho where low <= rho <= high, else 0 (IcePop);
    * `sequence_mask`: 1 where low <= exp(mean over the sequence of log rho) <= high, else 0 for all of its tokens.

    Raises:
        ValueError: another mode.
    """
    log_rho = (old_logps - rollout_logps).detach()
    rho = log_rho.clamp(-BOUND, BOUND).exp()
    if mode == "token_truncate":
        return rho.clamp(max=high)
    if mode == "token_mask":
        return torch.where((rho >= low) & (rho <= high), rho, 0)
    if mode == "sequence_mask":
        level = sequence_mean(log_rho, sequence_ids, num_sequences).clamp(-BOUND, BOUND).exp()
        return ((level >= low) & (level <= high)).to(rho.dtype)[sequence_ids]
    raise ValueError(f"no mismatch factor in mode '{mode}'; valid: {', '.join(CORRECTION_MODES[1:])}")


def stale_negative_mask(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, sequence_ids: Tensor, num_sequences: int, *, threshold: float
) -> Tensor:
    """Return `(T,)` 0 where A < 0 and the sequence's mean of old_logps - logps exceeds `threshold`, else 1.

    Such sequences are ones that the policy has already moved away from; pushing them further down only adds noise.
    """
    drift = sequence_mean((old_logps - logps).detach(), sequence_ids, num_sequences)
    return 1 - ((advantages < 0) & (drift[sequence_ids] > threshold)).to(logps.dtype)


@dataclass(frozen=True)
class MismatchCorrection:
    """Settings of the correction; `tokens` gives the factor of each token.

    Raises:
        ValueError: an unknown mode, or a range that is empty.

    Example:
        >>> old, rollout, ids = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -2.0]), torch.tensor([0, 0])
        >>> correction = MismatchCorrection("token_truncate", high=2.0)  # the ratios are 1 and e
        >>> correction.tokens(old, old, torch.ones(2), rollout, ids, 1)
        tensor([1., 2.])
    """

    mode: str = "none"
    low: float = 0.5
    high: float = 2.0
    stale_negative_kl: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in CORRECTION_MODES:
            raise ValueError(f"unknown correction.mode '{self.mode}'; valid: {', '.join(CORRECTION_MODES)}")
        if not 0 <= self.low < self.high:
            raise ValueError(f"correction needs 0 <= low < high, found low {self.low} and high {self.high}")

    def tokens(
        self,
        logps: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        rollout_logps: Tensor | None,
        sequence_ids: Tensor,
        num_sequences: int,
    ) -> Tensor | None:
        """Return the factor `(T,)` on the policy term, detached; None where nothing is set.

        Raises:
            ValueError: the mode needs `rollout_logps` and there are none.
        """
        factor = None
        if self.mode != "none":
            if rollout_logps is None:
                raise ValueError(f"correction.mode '{self.mode}' needs rollout_logps, and the batch has none")
            factor = mismatch_factor(
                old_logps, rollout_logps, sequence_ids, num_sequences, mode=self.mode, low=self.low, high=self.high
            )
        if self.stale_negative_kl is None:
            return factor
        mask = stale_negative_mask(
            logps, old_logps, advantages, sequence_ids, num_sequences, threshold=self.stale_negative_kl
        )
        return mask if factor is None else factor * mask
