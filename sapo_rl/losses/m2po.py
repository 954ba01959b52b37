"""M2PO, Second-Moment Trust Policy Optimization (arXiv 2510.01161): a batch's trust region, for stale data."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sapo_rl.losses.base import POLICY_LOSS_FN, BatchPolicyLossFn, TokenLosses
from sapo_rl.losses.metrics import ALONE, Reduction
from sapo_rl.losses.ratio import bounded_ratio, moved_with


@torch.no_grad()
def second_moment_limit(
    log_ratios: Tensor, advantages: Tensor, *, threshold: float, across: Reduction = ALONE
) -> Tensor:
    """Return the limit `()` float64 on (log r)^2 that leaves its mean at most `threshold`; the paper's algorithm 1.

    That algorithm takes the token with the largest M2 = (log r)^2 out of the trust-region tokens until the mean of
    those that are left is within the threshold. No token within the threshold is ever out: only sum and count of those
    leave a rank, beside the few larger values. The limit is inf where nothing is out, else halfway between the smallest
    token that is out and the largest that is left, or the threshold, where that is larger: a pass whose rounding
    differs masks the same tokens. Of equal tokens at the edge, whose order the paper leaves open, all are out.

    Args:
        log_ratios: log r of each token of this rank's part of the optimiser batch, `(T,)`.
        advantages: one value a sequence, repeated.
        threshold: the paper's tau_M2.
        across: how the ranks' parts become one.
    """
    squares = log_ratios.double().square()[moved_with(log_ratios, advantages)]
    small, large = squares[squares <= threshold], squares[squares > threshold]
    sums = torch.stack([small.sum(), small.new_tensor(len(small))])
    total, count = across.total(sums).unbind()
    most = int(across.joined(large.new_tensor([len(large)])).amax())
    if not most:
        return large.new_tensor(math.inf)
    padded = torch.nn.functional.pad(large, (0, most - len(large)), value=math.inf)
    ascending = across.joined(padded).sort().values
    ascending = ascending[ascending.isfinite()]
    means = (total + ascending.cumsum(0)) / (count + torch.arange(1, len(ascending) + 1, device=ascending.device))
    kept = int((means <= threshold).sum())  # they only grow
    if kept == len(ascending):
        return ascending.new_tensor(math.inf)
    below = ascending[kept - 1] if kept else ascending.new_tensor(threshold)
    return (below + ascending[kept]) / 2


def m2po_token_losses(
    log_ratios: Tensor, advantages: Tensor, limit: Tensor, *, log_ratio_clamp: float = 20.0
) -> TokenLosses:
    """Return -M r A of each packed token, all tensors `(T,)`; the paper's objective is its mean over all tokens.

    The mask M is 0 where the token is of the trust region (it has moved with its advantage) and (log r)^2 is not below
    the limit, else 1.

    Args:
        log_ratios: log r of each token, differentiable.
        advantages: one value a sequence, repeated.
        limit: `()`, of `second_moment_limit` over the whole optimiser batch.
        log_ratio_clamp: bound on |log r|.
    """
    ratio, inside = bounded_ratio(log_ratios, log_ratio_clamp)
    moved = log_ratios.detach()
    masked = moved_with(moved, advantages) & (moved.double().square() >= limit)
    kept = (~masked).to(ratio.dtype)
    return TokenLosses(-kept * ratio * advantages, kept * inside)


@POLICY_LOSS_FN.register_module("m2po")
@dataclass
class M2POPolicyLossFn(BatchPolicyLossFn):
    """M2PO with the paper's threshold, 0.04 in all its experiments.

    Raises:
        ValueError: a threshold that is not above 0.

    Example:
        >>> log_ratios = torch.tensor([0.1, 0.2, 1.0])  # of three tokens with advantage 1: their mean square is 0.35
        >>> M2POPolicyLossFn().token_losses(log_ratios, log_ratios, torch.ones(3)).gradient_weight
        tensor([1., 1., 0.])
    """

    name: ClassVar[str] = "m2po"
    ratio_level: str = field(default="token", init=False)
    """Always `token`: the moment is one of tokens."""
    _: KW_ONLY
    m2_threshold: float = 0.04
    """Bound on the mean of (log r)^2 over the tokens of a batch that have moved with their advantage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.m2_threshold > 0:
            raise ValueError(f"m2_threshold must be above 0, found {self.m2_threshold}")

    def batch_limit(self, log_ratios: Tensor, advantages: Tensor, across: Reduction = ALONE) -> Tensor:
        """Return `second_moment_limit` with this object's threshold."""
        return second_moment_limit(log_ratios, advantages, threshold=self.m2_threshold, across=across)

    def within(self, log_ratios: Tensor, advantages: Tensor, limit: Tensor) -> TokenLosses:
        """Return `m2po_token_losses` with this object's settings."""
        return m2po_token_losses(log_ratios, advantages, limit, log_ratio_clamp=self.log_ratio_clamp)
