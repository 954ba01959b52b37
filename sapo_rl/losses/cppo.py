"""CPPO, Cumulative Prefix-divergence Policy Optimization (arXiv 2606.10968): what a prefix has drifted counts as well.

Another method of that name prunes completions (arXiv 2503.22342); it is not this one.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sapo_rl.losses.base import POLICY_LOSS_FN, PolicyLossFn, TokenLosses
from sapo_rl.losses.dppo import binary_tv
from sapo_rl.losses.gates import by_sign
from sapo_rl.losses.grpo import check_clip
from sapo_rl.losses.ratio import bounded_ratio, moved_with


def position_weights(sequence_ids: Tensor, num_sequences: int, floor: float) -> Tensor:
    """Return w_t of each packed token `(T,)` float64: 1 at the first of its sequence, falling to `floor` at the last.

    The paper's equation 9, w_t = 1 - (1 - floor) (t - 1) / (n - 1) in a sequence of n tokens; 1 where n is 1.
    """
    counts = torch.zeros(num_sequences, dtype=torch.int64, device=sequence_ids.device)
    counts = counts.index_add(0, sequence_ids, torch.ones_like(sequence_ids))
    starts = counts.cumsum(0) - counts
    before = torch.arange(len(sequence_ids), device=sequence_ids.device) - starts[sequence_ids]
    return 1 - (1 - floor) * before.double() / (counts[sequence_ids] - 1).clamp(min=1)


def sums_before(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Return the sum `(T,)` of the packed `values` that stand before each token in its sequence."""
    totals = values.new_zeros(num_sequences).index_add(0, sequence_ids, values)
    starts = totals.cumsum(0) - totals
    return values.cumsum(0) - values - starts[sequence_ids]


def cppo_token_losses(
    logps: Tensor,
    log_ratios: Tensor,
    advantages: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    clip_low: float,
    clip_high: float,
    prefix_budget: float,
    weight_floor: float,
    log_ratio_clamp: float = 20.0,
) -> TokenLosses:
    """Return -M r A of each packed token, all tensors `(T,)`; the paper's equations 8 to 11 and its algorithm 1.

    The mask M is 0 where the token has moved with its advantage (A > 0 and r > 1, or A < 0 and r < 1) and

        w_t D_t > min(delta, delta + prefix_budget W_{t-1} - S_{t-1})

    else 1: D is the total variation of the sampled token as in DPPO, w the position's weight, S and W the sums of w D
    and of w over the tokens before it, masked ones included. Once the weighted mean of D over the prefix is above the
    budget, less is let through, and nothing where it is far above.

    Args:
        logps: log-probabilities now; with `log_ratios` they tell the old ones.
        log_ratios: log r of each token, differentiable.
        advantages: one value a sequence, repeated.
        sequence_ids: which of `num_sequences` sequences each token is of, ascending.
        num_sequences: how many there are.
        clip_low: the paper's delta where A < 0.
        clip_high: delta where A > 0.
        prefix_budget: the paper's delta_b, bound on the weighted mean of D over every prefix.
        weight_floor: the paper's w_min.
        log_ratio_clamp: bound on |log r|.
    """
    ratio, inside = bounded_ratio(log_ratios, log_ratio_clamp)
    now, moved = logps.detach().double(), log_ratios.detach().double()
    weights = position_weights(sequence_ids, num_sequences, weight_floor)
    drift = weights * binary_tv(now - moved, now)
    past_drift, past_weight = (sums_before(one, sequence_ids, num_sequences) for one in (drift, weights))
    delta = by_sign(advantages.double(), clip_high, clip_low)
    allowed = torch.minimum(delta, delta + prefix_budget * past_weight - past_drift)
    kept = (~moved_with(moved, advantages) | (drift <= allowed)).to(ratio.dtype)
    return TokenLosses(-kept * ratio * advantages, kept * inside)


@POLICY_LOSS_FN.register_module("cppo")
@dataclass
class CPPOPolicyLossFn(PolicyLossFn):
    """CPPO with the paper's thresholds; it takes the rollout's log-probabilities as old ones.

    Raises:
        ValueError: a negative bound or budget, or a floor outside (0, 1].

    Example:
        >>> old = torch.full((4,), 0.5).log()  # one completion whose tokens all lose 0.1 of probability, advantage -1
        >>> now, ids = torch.full((4,), 0.4).log(), torch.zeros(4, dtype=torch.int64)
        >>> CPPOPolicyLossFn().packed(now, old, -torch.ones(4), ids, 1).gradient_weight
        tensor([1., 0., 0., 0.])
    """

    name: ClassVar[str] = "cppo"
    ratio_level: str = field(default="token", init=False)
    """Always `token`: the divergence is a token's."""
    _: KW_ONLY
    clip_low: float = 0.15
    """Bound on the weighted divergence where the advantage is negative."""
    clip_high: float = 0.15
    """Bound on the weighted divergence where the advantage is positive."""
    prefix_budget: float = 0.02
    """Bound on its mean over what comes before a token."""
    weight_floor: float = 0.8
    """Weight of a completion's last token; the first one's is 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip_low, self.clip_high)
        if not self.prefix_budget >= 0:
            raise ValueError(f"prefix_budget must be 0 or more, found {self.prefix_budget}")
        if not 0 < self.weight_floor <= 1:
            raise ValueError(f"weight_floor must be above 0 and at most 1, found {self.weight_floor}")

    def packed(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, sequence_ids: Tensor, num_sequences: int
    ) -> TokenLosses:
        """Return the loss of each token of a packed micro-batch: all tensors `(T,)`, ids in 0..num_sequences-1."""
        return self._losses(logps, logps - old_logps.detach(), advantages, sequence_ids, num_sequences)

    def token_losses(self, logps: Tensor, log_ratios: Tensor, advantages: Tensor) -> TokenLosses:
        """Return the losses of sequences of one token each."""
        return self._losses(logps, log_ratios, advantages, torch.arange(len(logps), device=logps.device), len(logps))

    def _losses(
        self, logps: Tensor, log_ratios: Tensor, advantages: Tensor, sequence_ids: Tensor, count: int
    ) -> TokenLosses:
        return cppo_token_losses(
            logps,
            log_ratios,
            advantages,
            sequence_ids,
            count,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            prefix_budget=self.prefix_budget,
            weight_floor=self.weight_floor,
            log_ratio_clamp=self.log_ratio_clamp,
        )
