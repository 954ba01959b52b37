"""What a step shows of its policy update: is the gate doing anything, and has the policy run away?

* `policy/weight_mean_pos`, `_neg`: mean gradient weight where A > 0, where A < 0 (NaN where there is no such
  token); `policy/weight_below_half`: fraction of tokens whose weight is under 1/2; `policy/weighted_ratio_max`:
  max of weight * r.
* `policy/weight_mean_with`, `_against`: mean gradient weight of the tokens whose probability has moved with their
  advantage since the rollout (A > 0 and r > 1, or A < 0 and r < 1), and of those that have moved against it (NaN where
  there is no such token); `policy/against_fraction`: fraction of all tokens that have moved against it.
* `policy/ratio_mean`, `_min`, `_max`, `_p99`; `policy/outside_clip_fraction`: fraction with |r - 1| > 0.2.
* `policy/kl_old_k1`, `_k3`: KL(old || now). With `rollout_logps` also `policy/kl_rollout_k1`, `_k3`: KL(vLLM ||
  now), drift and mismatch together, and `mismatch/kl_k1`, `_k3`: KL(vLLM || old), the mismatch of engine and
  trainer alone.
* `policy/log_ratio_var_mean`, `_max`: variance of log r inside a sequence; `policy/sequence_gate_bound`: mean of
  tau^2 / 4 * variance, the paper's bound (equation 21) on how far SAPO is from a gate on whole sequences.

Everything stays on the device as 0-d tensors; nothing here waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sapo_rl.losses.aggregation import sequence_mean
from sapo_rl.losses.divergence import kl_estimate
from sapo_rl.losses.gates import by_sign
from sapo_rl.losses.ratio import bounded_ratio

CLIP_RANGE = 0.2
"""GRPO's usual clip range, the yardstick of `policy/outside_clip_fraction`."""
RATIO_BOUND = 20.0  # on |log r|, so that exp stays finite in float32
MANY_UPDATES = 8
"""Updates per rollout batch above which published runs with a low temperature went badly."""
LOW_TEMPERATURE = 2.0
"""Temperatures below this count as low: the weight halves no sooner than at |r - 1| = 0.88."""


def _unchanged(values: Tensor) -> Tensor:
    return values


class Reduction(NamedTuple):
    """Collectives that combine metrics over ranks (sums, extremes).

    All ranks must call them in the same order. The default does nothing: one rank.

    Example:
        >>> Reduction(total=lambda values: accelerator.reduce(values, "sum"), joined=accelerator.gather)
    """

    total: Callable[[Tensor], Tensor] = _unchanged
    """(n,) to the sums over the ranks, (n,)."""
    joined: Callable[[Tensor], Tensor] = _unchanged
    """(n,), as long on every rank, to all ranks' values, (ranks * n,)."""


ALONE = Reduction()


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
    num_tokens: int | None = None,
    across: Reduction = ALONE,
) -> dict[str, Tensor]:
    """Return a step's metrics from the packed tokens `(T,)` of all its updates together, each a 0-d float64 tensor.

    They are described at the top of this module.

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
        num_tokens: T of all ranks together, where `across` joins several.
        across: how.

    Returns:
        The metrics; none where there is no token.
    """
    num_tokens = logps.numel() if num_tokens is None else num_tokens
    if not num_tokens:
        return {}
    ratio = token_ratio(logps, old_logps)
    variance = _variance_inside_sequences(logps - old_logps, sequence_ids, num_sequences)
    tau = by_sign(sequence_mean(advantages, sequence_ids, num_sequences), tau_pos, tau_neg)
    tokens, sequences = _count(len(ratio), ratio), _count(num_sequences, ratio)
    sides = _sides(advantages, logps, old_logps)
    means = {f"policy/weight_mean_{name}": (_sum(gradient_weight * side), _sum(side)) for name, side in sides.items()}
    divergences = _divergences(logps, old_logps, rollout_logps)
    means |= {name: (_sum(values), tokens) for name, values in divergences.items()} | {
        "policy/against_fraction": (_sum(sides["against"]), tokens),
        "policy/weight_below_half": (_sum(gradient_weight < 0.5), tokens),
        "policy/ratio_mean": (_sum(ratio), tokens),
        "policy/outside_clip_fraction": (_sum((ratio - 1).abs() > CLIP_RANGE), tokens),
        "policy/log_ratio_var_mean": (_sum(variance), sequences),
        "policy/sequence_gate_bound": (_sum(tau**2 / 4 * variance), sequences),
    }
    highest = {
        "policy/weighted_ratio_max": gradient_weight * ratio,
        "policy/log_ratio_var_max": variance,
        "policy/ratio_max": ratio,
    }
    lowest = {"policy/ratio_min": ratio}
    p99 = {"policy/ratio_p99": _percentile_99(ratio, num_tokens, across)}
    return _mean(means, across) | _extreme(highest, 1, across) | _extreme(lowest, -1, across) | p99


def token_ratio(logps: Tensor, old_logps: Tensor) -> Tensor:
    """Return the ratio r of each token `(T,)` that the metrics speak of, whichever one the loss has of its sequence."""
    return bounded_ratio(logps - old_logps, RATIO_BOUND)[0]


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64)


def _count(number: int, like: Tensor) -> Tensor:
    return like.new_full((), number, dtype=torch.float64)  # torch.tensor would wait for the device


def _mean(pairs: Mapping[str, tuple[Tensor, Tensor]], across: Reduction) -> dict[str, Tensor]:
    """The means that the ranks' sums and counts, 0-d each, come to."""
    sums, counts = zip(*pairs.values(), strict=True)
    sums, counts = across.total(torch.stack([*sums, *counts])).chunk(2)
    return dict(zip(pairs, sums / counts, strict=True))


def _extreme(columns: Mapping[str, Tensor], sign: int, across: Reduction) -> dict[str, Tensor]:
    """The largest of each column's values where `sign` is 1, the smallest where it is -1."""
    pad = torch.nn.functional.pad  # a rank may have none
    own = [pad(sign * values.double(), (0, 1), value=-math.inf).amax() for values in columns.values()]
    everyone = across.joined(torch.stack(own)).view(-1, len(own))
    return dict(zip(columns, sign * everyone.amax(0), strict=True))


def _sides(advantages: Tensor, logps: Tensor, old_logps: Tensor) -> dict[str, Tensor]:
    """Which tokens have a positive or negative advantage, and which have moved with or against it."""
    positive, negative = advantages > 0, advantages < 0
    risen, fallen = logps > old_logps, logps < old_logps
    return {
        "pos": positive,
        "neg": negative,
        "with": positive & risen | negative & fallen,
        "against": positive & fallen | negative & risen,
    }


def _divergences(logps: Tensor, old_logps: Tensor, rollout_logps: Tensor | None) -> dict[str, Tensor]:
    """The estimate of each KL divergence at each token."""
    pairs = {"policy/kl_old": (old_logps, logps)}
    if rollout_logps is not None:
        pairs |= {"policy/kl_rollout": (rollout_logps, logps), "mismatch/kl": (rollout_logps, old_logps)}
    return {f"{name}_{kind}": kl_estimate(*pair, kind) for name, pair in pairs.items() for kind in ("k1", "k3")}


def _percentile_99(values: Tensor, count: int, across: Reduction) -> Tensor:
    """The value below or at which 99% of all ranks' `count` values are; only their largest ones leave a rank."""
    above = count - math.ceil(0.99 * count) + 1
    own = values.double().topk(min(above, len(values)), sorted=False).values
    own = torch.nn.functional.pad(own, (0, above - len(own)), value=-math.inf)
    return across.joined(own).topk(above).values[-1]


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
