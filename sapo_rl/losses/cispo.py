"""CISPO (arXiv 2506.13585): a clipped, constant importance weight; no token loses its gradient."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from torch import Tensor

from sapo_rl.losses.base import POLICY_LOSS_FN, PolicyLossFn, TokenLosses
from sapo_rl.losses.grpo import check_clip
from sapo_rl.losses.ratio import bounded_ratio


def cispo_token_losses(
    logps: Tensor,
    log_ratios: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    log_ratio_clamp: float = 20.0,
) -> TokenLosses:
    """Return CISPO's loss of each packed token, -A clip(r, 1 - clip_low, 1 + clip_high) logp, the clip constant.

    All tensors are `(T,)`; the gradient flows through `logps` only.
    """
    ratio, _ = bounded_ratio(log_ratios.detach(), log_ratio_clamp)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return TokenLosses(-advantages * clipped * logps, clipped / ratio)


@POLICY_LOSS_FN.register_module("cispo")
@dataclass
class CISPOPolicyLossFn(PolicyLossFn):
    """CISPO.

    Raises:
        ValueError: a negative clip width.

    Example:
        >>> import torch
        >>> log_ratios = torch.tensor([0.5, 1.0, 1.5]).log()  # of three tokens with advantage 1
        >>> CISPOPolicyLossFn().token_losses(log_ratios, log_ratios, torch.ones(3)).gradient_weight
        tensor([1.6000, 1.0000, 0.8000])
    """

    name: ClassVar[str] = "cispo"
    _: KW_ONLY
    clip_low: float = 0.2
    """Width of the clip range below 1; 1 leaves the ratio unbounded below."""
    clip_high: float = 0.2
    """Width of the clip range above 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip_low, self.clip_high)

    def token_losses(self, logps: Tensor, log_ratios: Tensor, advantages: Tensor) -> TokenLosses:
        """Return `cispo_token_losses` with this object's settings."""
        return cispo_token_losses(
            logps,
            log_ratios,
            advantages,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            log_ratio_clamp=self.log_ratio_clamp,
        )
