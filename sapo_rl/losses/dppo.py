"""DPPO, Divergence Proximal Policy Optimization (arXiv 2602.04879): a trust region in probabilities, not in ratios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sapo_rl.losses.base import POLICY_LOSS_FN, PolicyLossFn, TokenLosses
from sapo_rl.losses.grpo import check_clip
from sapo_rl.losses.ratio import bounded_ratio


def binary_tv(old_logps: Tensor, logps: Tensor) -> Tensor:
    """Return the total variation between the sampled token and all others, then and now: |p - q|, shaped as `logps`."""
    return (logps.exp() - old_logps.exp()).abs()


def binary_kl(old_logps: Tensor, logps: Tensor) -> Tensor:
    """Return KL(old || now) between the sampled token and all others, shaped as `logps`; inf where q = 1 and p < 1.

    With p and q the token's probability then and now: p log(p / q) + (1 - p) log((1 - p) / (1 - q)).
    """
    others, others_now = (-torch.expm1(values).clamp(max=0) for values in (old_logps, logps))
    kept = old_logps.exp() * (old_logps - logps)
    return kept + torch.xlogy(others, others) - torch.xlogy(others, others_now)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"tv": binary_tv, "kl": binary_kl}
"""What bounds a token, by name."""


def dppo_token_losses(
    logps: Tensor,
    log_ratios: Tensor,
    advantages: Tensor,
    *,
    divergence: str,
    clip_low: float,
    clip_high: float,
    log_ratio_clamp: float = 20.0,
) -> TokenLosses:
    """Return -M r A of each packed token, all tensors `(T,)`.

    The mask M is 0 where the token has moved with its advantage (A > 0 and r > 1, or A < 0 and r < 1) and the
    divergence exceeds its bound, else 1: as PPO's clip, with a divergence in place of |r - 1|. A rare token may so
    change its ratio much, and a likely one little.

    Args:
        logps: log-probabilities now; with `log_ratios` they tell the old ones.
        log_ratios: log r of each token, differentiable.
        advantages: one value a sequence, repeated.
        divergence: one of `DIVERGENCES`.
        clip_low: bound on it where A < 0.
        clip_high: bound where A > 0.
        log_ratio_clamp: bound on |log r|.
    """
    ratio, inside = bounded_ratio(log_ratios, log_ratio_clamp)
    now, moved = logps.detach(), log_ratios.detach()
    distance = DIVERGENCES[divergence](now - moved, now)
    positive = advantages > 0
    masked = torch.where(positive, (moved > 0) & (distance > clip_high), (moved < 0) & (distance > clip_low))
    kept = (~masked).to(ratio.dtype)
    return TokenLosses(-kept * ratio * advantages, kept * inside)


@POLICY_LOSS_FN.register_module("dppo")
@dataclass
class DPPOPolicyLossFn(PolicyLossFn):
    """DPPO with the total variation of the sampled token; the paper takes the rollout's log-probabilities as old ones.

    Raises:
        ValueError: a negative bound.

    Example:
        >>> log_ratios = torch.tensor([0.5, 1.0, 1.5]).log()  # of three tokens with advantage 1
        >>> DPPOPolicyLossFn().token_losses(log_ratios, log_ratios, torch.ones(3)).gradient_weight
        tensor([1., 1., 0.])
    """

    name: ClassVar[str] = "dppo"
    divergence: ClassVar[str] = "tv"
    ratio_level: str = field(default="token", init=False)
    """Always `token`: the divergence is a token's."""
    _: KW_ONLY
    clip_low: float = 0.2
    """Bound on the divergence where the advantage is negative."""
    clip_high: float = 0.2
    """Bound on the divergence where the advantage is positive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip_low, self.clip_high)

    def token_losses(self, logps: Tensor, log_ratios: Tensor, advantages: Tensor) -> TokenLosses:
        """Return `dppo_token_losses` with this object's settings."""
        return dppo_token_losses(
            logps,
            log_ratios,
            advantages,
            divergence=self.divergence,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            log_ratio_clamp=self.log_ratio_clamp,
        )


@POLICY_LOSS_FN.register_module("dppo_kl")
@dataclass
class DPPOKLPolicyLossFn(DPPOPolicyLossFn):
    """DPPO with the KL divergence of the sampled token, whose bounds are smaller: 0.05 is usual.

    Example:
        >>> log_ratios = torch.tensor([0.5, 1.0, 1.5]).log()  # of three tokens with advantage 1
        >>> DPPOKLPolicyLossFn().token_losses(log_ratios, log_ratios, torch.ones(3)).gradient_weight
        tensor([1., 1., 1.])
    """

    divergence: ClassVar[str] = "kl"
    _: KW_ONLY
    clip_low: float = 0.05
    """Bound on the divergence where the advantage is negative."""
    clip_high: float = 0.05
    """Bound on the divergence where the advantage is positive."""
