"""A loss of one's own, and its setting."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sapo_rl.losses import PolicyLossFn, TokenLosses, bounded_ratio


@dataclass
class Tapered(PolicyLossFn):
    """After TOPR (arXiv 2503.14286), by token: what was good is imitated, whatever its ratio; bad tokens are let go of.

    The weight of a token is 1 where A > 0, and its ratio, held constant and at most `clip_high`, elsewhere: a bad token
    that the policy has dropped already is pushed no further.
    """

    clip_high: float = 1.0

    def token_losses(self, logps: Tensor, log_ratios: Tensor, advantages: Tensor) -> TokenLosses:
        ratio, _ = bounded_ratio(log_ratios.detach(), self.log_ratio_clamp)
        weight = torch.where(advantages > 0, torch.ones_like(ratio), ratio.clamp(max=self.clip_high))
        return TokenLosses(-weight * advantages * logps, weight / ratio)
