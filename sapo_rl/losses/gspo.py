"""GSPO, Group Sequence Policy Optimization (arXiv 2507.18071): GRPO's clip on the ratio of the whole sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from sapo_rl.losses.base import POLICY_LOSS_FN
from sapo_rl.losses.grpo import GRPOPolicyLossFn


@POLICY_LOSS_FN.register_module("gspo")
@dataclass
class GSPOPolicyLossFn(GRPOPolicyLossFn):
    """GRPO with s = exp(mean_t log r_t) for the ratio of every token of a sequence.

    s stays far closer to 1 than a token's ratio: the SAPO paper's runs clip it at `clip_low=3e-4, clip_high=4e-4`.

    Example:
        >>> import torch
        >>> log_ratios = torch.tensor([0.5, 1.0, 1.5]).log()  # of one completion with advantage 1
        >>> old, advantages, sequence_ids = torch.zeros(3), torch.ones(3), torch.tensor([0, 0, 0])
        >>> GSPOPolicyLossFn().packed(log_ratios, old, advantages, sequence_ids, 1).gradient_weight
        tensor([1., 1., 1.])
    """

    name: ClassVar[str] = "gspo"
    ratio_level: str = field(default="sequence", init=False)
    """Always `sequence`: that is what GSPO is."""
