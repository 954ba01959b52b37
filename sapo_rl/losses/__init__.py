"""Policy losses: pure functions on packed tokens, thin classes over them, and the table of their names.

Two ways in. `build_loss` returns the function that the trainer calls on each packed micro-batch. The classes in
`POLICY_LOSS_FN` take padded `(B, T)` tensors, as Trinity-RFT's do. Both run the same token functions.
"""

from sapo_rl.losses.aggregation import AGGREGATION_MODES, sequence_mean, token_weights
from sapo_rl.losses.base import POLICY_LOSS_FN, BatchPolicyLossFn, PolicyLossFn, TokenLosses
from sapo_rl.losses.budget import LARGEST_SCALE, GatedKL
from sapo_rl.losses.build import LossInputs, LossOutputs, PackedLoss, build_loss
from sapo_rl.losses.cispo import CISPOPolicyLossFn, cispo_token_losses
from sapo_rl.losses.correction import MismatchCorrection, mismatch_factor, stale_negative_mask
from sapo_rl.losses.cppo import CPPOPolicyLossFn, cppo_token_losses
from sapo_rl.losses.divergence import KLPenalty, kl_estimate
from sapo_rl.losses.dppo import DPPOKLPolicyLossFn, DPPOPolicyLossFn, binary_kl, binary_tv, dppo_token_losses
from sapo_rl.losses.gates import GATES, by_sign, gate_rise, gate_value, gate_weight, half_weight_distance
from sapo_rl.losses.gmpo import GMPOPolicyLossFn, gmpo_token_losses
from sapo_rl.losses.grpo import GRPOPolicyLossFn, clipped_token_losses
from sapo_rl.losses.gspo import GSPOPolicyLossFn
from sapo_rl.losses.m2po import M2POPolicyLossFn, m2po_token_losses, second_moment_limit
from sapo_rl.losses.metrics import Reduction, inert_temperature_warning, policy_metrics, token_ratio
from sapo_rl.losses.ratio import bounded_ratio, log_ratio
from sapo_rl.losses.reinforce import ReinforcePolicyLossFn, reinforce_token_losses
from sapo_rl.losses.sapo import SAPOPolicyLossFn, one_sided_token_losses, sapo_token_losses
from sapo_rl.losses.trinity import aggregate_loss, masked_mean
from sapo_rl.losses.vespo import VESPOPolicyLossFn, vespo_token_losses

__all__ = [
    "AGGREGATION_MODES",
    "GATES",
    "LARGEST_SCALE",
    "POLICY_LOSS_FN",
    "BatchPolicyLossFn",
    "CISPOPolicyLossFn",
    "CPPOPolicyLossFn",
    "DPPOKLPolicyLossFn",
    "DPPOPolicyLossFn",
    "GMPOPolicyLossFn",
    "GRPOPolicyLossFn",
    "GSPOPolicyLossFn",
    "GatedKL",
    "KLPenalty",
    "LossInputs",
    "LossOutputs",
    "M2POPolicyLossFn",
    "MismatchCorrection",
    "PackedLoss",
    "PolicyLossFn",
    "Reduction",
    "ReinforcePolicyLossFn",
    "SAPOPolicyLossFn",
    "TokenLosses",
    "VESPOPolicyLossFn",
    "aggregate_loss",
    "binary_kl",
    "binary_tv",
    "bounded_ratio",
    "build_loss",
    "by_sign",
    "cispo_token_losses",
    "clipped_token_losses",
    "cppo_token_losses",
    "dppo_token_losses",
    "gate_rise",
    "gate_value",
    "gate_weight",
    "gmpo_token_losses",
    "half_weight_distance",
    "inert_temperature_warning",
    "kl_estimate",
    "log_ratio",
    "m2po_token_losses",
    "masked_mean",
    "mismatch_factor",
    "one_sided_token_losses",
    "policy_metrics",
    "reinforce_token_losses",
    "sapo_token_losses",
    "second_moment_limit",
    "sequence_mean",
    "stale_negative_mask",
    "token_ratio",
    "token_weights",
    "vespo_token_losses",
]
