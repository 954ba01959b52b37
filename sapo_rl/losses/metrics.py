"""What a step shows of its policy update: is the gate doing anything, and has the policy run away?

Everything stays on the device as 0-d tensors; nothing here waits for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sapo_rl.losses.aggregation import sequence_mean
from sapo_rl.losses.divergence import kl_estimate
from sapo_rl.losses.gates import temperatures
from sapo_rl.losses.ratio import bounded_ratio

CLIP_RANGE = 0.2
"""GRPO's usual clip range, the yardstick of `policy/outside_clip_fraction`."""
RATIO_BOUND = 20.0  # on |log r|, so that exp stays finite in float32
MANY_UPDATES = 8
"""Updates per rollout batch above which published runs with a low temperature went badly."""
LOW_TEMPERATURE = 2.0
"""Temperatures below this count as low: the weight halves no sooner than at |r - 1| = 0.88."""


@torch.no_grad()
def policy_metrics(
    *,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    gradient_weight: Tensor,
    tau_pos: float,
    tau_neg: float,
    rollout_logps: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return a step's metrics from the packed tokens `(T,)` of all its updates together, each a 0-d tensor.

    * `policy/weight_mean_pos`, `_neg`: mean gradient weight where A > 0, where A < 0 (NaN where there is no such
      token); `policy/weight_below_half`: fraction of tokens whose weight is under 1/2; `policy/weighted_ratio_max`:
      max of weight * r.
    * `policy/ratio_mean`, `_min`, `_max`, `_p99`; `policy/outside_clip_fraction`: fraction with |r - 1| > 0.2.
    * `policy/kl_old_k1`, `_k3`: KL(old || now). With `rollout_logps` also `policy/kl_rollout_k1`, `_k3`: KL(vLLM ||
      now), drift and mismatch together, and `mismatch/kl_k1`, `_k3`: KL(vLLM || old), the mismatch of engine and
      trainer alone.
    * `policy/log_ratio_var_mean`, `_max`: variance of log r inside a sequence; `policy/sequence_gate_bound`: mean of
      tau^2 / 4 * variance, the paper's bound (equation 21) on how far SAPO is from a gate on whole sequences.

    Args:
        logps: log-probabilities at the update that used the token.
        old_logps: the trainer's log-probabilities at rollout time.
        advantages: one value a sequence, repeated.
        sequence_ids: int64 in 0..num_sequences-1.
        num_sequences: number of sequences; ones without tokens count as variance 0.
        gradient_weight: `LossOutputs.gradient_weight`.
        tau_pos: temperature where A > 0.
        tau_neg: temperature elsewhere.
        rollout_logps: vLLM's log-probabilities.

    Returns:
        The metrics; none where there is no token.
    """
    if logps.numel() == 0:
        return {}
    ratio, _ = bounded_ratio(logps - old_logps, RATIO_BOUND)
    positive, negative = (advantages > 0).to(ratio.dtype), (advantages < 0).to(ratio.dtype)
    tau = temperatures(sequence_mean(advantages, sequence_ids, num_sequences), tau_pos, tau_neg)
    variance = _variance_inside_sequences(logps - old_logps, sequence_ids, num_sequences)
    metrics = {
        "policy/weight_mean_pos": (gradient_weight * positive).sum() / positive.sum(),
        "policy/weight_mean_neg": (gradient_weight * negative).sum() / negative.sum(),
        "policy/weight_below_half": (gradient_weight < 0.5).to(ratio.dtype).mean(),
        "policy/weighted_ratio_max": (gradient_weight * ratio).max(),
        "policy/log_ratio_var_mean": variance.mean(),
        "policy/log_ratio_var_max": variance.max(),
        "policy/sequence_gate_bound": (tau**2 / 4 * variance).mean(),
        **_ratio_statistics(ratio),
    }
    for kind in ("k1", "k3"):
        metrics[f"policy/kl_old_{kind}"] = kl_estimate(old_logps, logps, kind).mean()
        if rollout_logps is not None:
            metrics[f"policy/kl_rollout_{kind}"] = kl_estimate(rollout_logps, logps, kind).mean()
            metrics[f"mismatch/kl_{kind}"] = kl_estimate(rollout_logps, old_logps, kind).mean()
    return metrics


def _ratio_statistics(ratio: Tensor) -> dict[str, Tensor]:
    rank_p99 = math.ceil(0.99 * ratio.numel())  # kthvalue, since quantile refuses more than 2^24 values
    return {
        "policy/ratio_mean": ratio.mean(),
        "policy/ratio_min": ratio.min(),
        "policy/ratio_max": ratio.max(),
        "policy/ratio_p99": ratio.kthvalue(rank_p99).values,
        "policy/outside_clip_fraction": ((ratio - 1).abs() > CLIP_RANGE).to(ratio.dtype).mean(),
    }


def _variance_inside_sequences(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Return the population variance `(S,)` of the values of each sequence."""
    mean = sequence_mean(values, sequence_ids, num_sequences)
    return sequence_mean((values - mean[sequence_ids]) ** 2, sequence_ids, num_sequences)


def inert_temperature_warning(
    updates_per_rollout: int, tau_pos: float, tau_neg: float, *, fresh_rollouts: bool = True
) -> str | None:
    """Return a warning where SAPO's temperatures cannot do their work under the paper's gradient, else None.

    Args:
        updates_per_rollout: optimiser updates on each rollout batch.
        tau_pos: temperature where A > 0.
        tau_neg: temperature elsewhere.
        fresh_rollouts: the policy of the first update wrote the rollouts itself, so that r = 1 there.
    """
    if updates_per_rollout <= 1 and fresh_rollouts:
        return (
            "SAPO's temperatures are inert: with one update per fresh rollout batch every ratio is 1, where the gate "
            "passes the plain policy gradient whatever tau is. Take 2 or more updates per rollout batch to use it."
        )
    if updates_per_rollout > MANY_UPDATES and min(tau_pos, tau_neg) < LOW_TEMPERATURE:
        return (
            f"{updates_per_rollout} updates per rollout batch with tau {tau_pos:g}/{tau_neg:g}: in arXiv 2602.10693 "
            "SAPO fell from 65 points with 4 mini-batches per rollout batch to 50 with 16 and 21 with 32. Take fewer "
            "updates, a higher tau (the weight halves at |r - 1| = 1.763 / tau), or loss.correction.stale_negative_kl."
        )
    return None
