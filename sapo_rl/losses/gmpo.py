"""GMPO, Geometric-Mean Policy Optimization (arXiv 2507.20673): a sequence's mean ratio, each token's part bounded."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sapo_rl.losses.aggregation import sequence_mean
from sapo_rl.losses.base import POLICY_LOSS_FN, PolicyLossFn, TokenLosses
from sapo_rl.losses.grpo import check_clip
from sapo_rl.losses.ratio import bounded_ratio, log_ratio


def gmpo_token_losses(
    log_ratios: Tensor,
    advantages: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    clip_low: float,
    clip_high: float,
    log_ratio_clamp: float = 20.0,
) -> TokenLosses:
    """Return -g A of each packed token, all tensors `(T,)`; g is the geometric mean of its sequence's bounded ratios.

    log g is the mean over the sequence of min(log r_t, clip_high) where A > 0, and of max(log r_t, -clip_low)
    elsewhere: a token that has moved further with its advantage pushes no more, one that has moved against it is not
    bounded.

    Args:
        log_ratios: log r of each token, differentiable.
        advantages: one value a sequence, repeated.
        sequence_ids: which of `num_sequences` sequences each token is of.
        num_sequences: how many there are.
        clip_low: bound on -log r where A < 0.
        clip_high: bound on log r where A > 0.
        log_ratio_clamp: bound on |log g|.
    """
    bounded = torch.where(advantages > 0, log_ratios.clamp(max=clip_high), log_ratios.clamp(min=-clip_low))
    kept = (bounded == log_ratios).to(log_ratios.dtype)
    log_g, log_s = (sequence_mean(one, sequence_ids, num_sequences)[sequence_ids] for one in (bounded, log_ratios))
    mean, inside = bounded_ratio(log_g, log_ratio_clamp)
    whole, _ = bounded_ratio(log_s.detach(), log_ratio_clamp)
    return TokenLosses(-mean * advantages, kept * inside * mean.detach() / whole)


@POLICY_LOSS_FN.register_module("gmpo")
@dataclass
class GMPOPolicyLossFn(PolicyLossFn):
    """GMPO with the paper's bounds, which are on log r: a ratio from e^-0.4 to e^0.4.

    Raises:
        ValueError: a negative bound.

    Example:
        >>> log_ratios = torch.tensor([0.5, 1.0, 1.5]).log()  # of one completion with advantage 1
        >>> old, advantages, sequence_ids = torch.zeros(3), torch.ones(3), torch.tensor([0, 0, 0])
        >>> GMPOPolicyLossFn().packed(log_ratios, old, advantages, sequence_ids, 1).gradient_weight
        tensor([0.9982, 0.9982, 0.0000])
    """

    name: ClassVar[str] = "gmpo"
    ratio_level: str = field(default="sequence", init=False)
    """Always `sequence`: the loss takes the geometric mean over it."""
    _: KW_ONLY
    clip_low: float = 0.4
    """Bound on -log r where the advantage is negative."""
    clip_high: float = 0.4
    """Bound on log r where the advantage is positive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip_low, self.clip_high)

    def packed(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, sequence_ids: Tensor, num_sequences: int
    ) -> TokenLosses:
        """Return the loss of each token of a packed micro-batch: all tensors `(T,)`, ids in 0..num_sequences-1."""
        log_ratios = log_ratio(logps, old_logps, sequence_ids, num_sequences, "token")
        return self._losses(log_ratios, advantages, sequence_ids, num_sequences)

    def token_losses(self, logps: Tensor, log_ratios: Tensor, advantages: Tensor) -> TokenLosses:
        """Return the losses of sequences of one token each."""
        return self._losses(log_ratios, advantages, torch.arange(len(logps), device=logps.device), len(logps))

    def _losses(self, log_ratios: Tensor, advantages: Tensor, sequence_ids: Tensor, count: int) -> TokenLosses:
        return gmpo_token_losses(
            log_ratios,
            advantages,
            sequence_ids,
            count,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            log_ratio_clamp=self.log_ratio_clamp,
        )
