"""GRPO's clip (arXiv 2402.03300), with clip-higher (DAPO, arXiv 2503.14476) and dual clip (arXiv 1912.09729)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sapo_rl.losses.base import POLICY_LOSS_FN, PolicyLossFn, TokenLosses
from sapo_rl.losses.ratio import bounded_ratio, check_dual_clip


def clipped_token_losses(
    log_ratios: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    log_ratio_clamp: float = 20.0,
) -> TokenLosses:
    """Return PPO's clipped loss of each packed token, -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    Written one-sided, as it acts (SAPO paper, equation 24): A > 0 stops gaining above 1 + clip_high, A <= 0 below
    1 - clip_low, and with `dual_clip` = c also above r = c, where the loss -c A is constant. The gradient's weight is
    1 or 0.

    Args:
        log_ratios: `(T,)` log r, differentiable.
        advantages: `(T,)`.
        clip_low: width of the clip range below 1.
        clip_high: width above 1; clip-higher where it exceeds `clip_low`.
        dual_clip: c above 1, or None.
        log_ratio_clamp: bound on |log r|.
    """
    ratio, inside = bounded_ratio(log_ratios, log_ratio_clamp)
    ceiling = float("inf") if dual_clip is None else dual_clip
    positive = advantages > 0
    clipped = torch.where(positive, ratio.clamp(max=1 + clip_high), ratio.clamp(1 - clip_low, ceiling))
    now = ratio.detach()
    kept = torch.where(positive, now <= 1 + clip_high, (now >= 1 - clip_low) & (now <= ceiling))
    return TokenLosses(-clipped * advantages, kept.to(now.dtype) * inside)


@POLICY_LOSS_FN.register_module("grpo")
@dataclass
class GRPOPolicyLossFn(PolicyLossFn):
    """GRPO. DAPO takes `clip_high=0.28, loss_agg_mode="token-mean"`, Dr. GRPO `"seq-mean-token-sum-norm"`.

    Raises:
        ValueError: a negative clip width, or a dual clip that is not above 1.

    Example:
        >>> log_ratios = torch.tensor([0.5, 1.0, 1.5]).log()  # of three tokens with advantage 1
        >>> GRPOPolicyLossFn().token_losses(log_ratios, log_ratios, torch.ones(3)).gradient_weight
        tensor([1., 1., 0.])
    """

    name: ClassVar[str] = "grpo"
    _: KW_ONLY
    clip_low: float = 0.2
    """Width of the clip range below 1."""
    clip_high: float = 0.2
    """Width of the clip range above 1."""
    dual_clip: float | None = None
    """Bound on the ratio where the advantage is negative, above 1; None is off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip_low, self.clip_high)
        check_dual_clip(self.dual_clip)

    def token_losses(self, logps: Tensor, log_ratios: Tensor, advantages: Tensor) -> TokenLosses:
        """Return `clipped_token_losses` with this object's settings."""
        return clipped_token_losses(
            log_ratios,
            advantages,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            log_ratio_clamp=self.log_ratio_clamp,
        )


def check_clip(clip_low: float, clip_high: float) -> None:
    """Raise ValueError unless both widths of a clip range are 0 or more."""
    for key, width in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not width >= 0:
            raise ValueError(f"{key} must be 0 or more, found {width}")
