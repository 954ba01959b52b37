"""REINFORCE: the plain policy gradient, without importance ratio or trust region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sapo_rl.losses.base import POLICY_LOSS_FN, PolicyLossFn, TokenLosses
from sapo_rl.losses.ratio import bounded_ratio


def reinforce_token_losses(
    logps: Tensor, log_ratios: Tensor, advantages: Tensor, *, log_ratio_clamp: float = 20.0
) -> TokenLosses:
    """Return -A logp of each packed token, all tensors `(T,)`; the gradient weight is 1 / r."""
    ratio, _ = bounded_ratio(log_ratios.detach(), log_ratio_clamp)
    return TokenLosses(-advantages * logps, 1 / ratio)


@POLICY_LOSS_FN.register_module("reinforce")
@dataclass
class ReinforcePolicyLossFn(PolicyLossFn):
    """REINFORCE; right for one update on fresh rollouts, biased for more.

    Example:
        >>> import torch
        >>> log_ratios = torch.tensor([0.5, 1.0, 1.5]).log()  # of three tokens with advantage 1
        >>> ReinforcePolicyLossFn().token_losses(log_ratios, log_ratios, torch.ones(3)).gradient_weight
        tensor([2.0000, 1.0000, 0.6667])
    """

    name: ClassVar[str] = "reinforce"

    def token_losses(self, logps: Tensor, log_ratios: Tensor, advantages: Tensor) -> TokenLosses:
        """Return `reinforce_token_losses`."""
        return reinforce_token_losses(logps, log_ratios, advantages, log_ratio_clamp=self.log_ratio_clamp)
