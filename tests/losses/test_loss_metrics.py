"""What a step reports, recomputed plainly, and the warnings about temperatures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sapo_rl.losses import build_loss, inert_temperature_warning, policy_metrics
from sapo_rl.losses.build import LossInputs


def step(rollout: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Metrics of a random step of 300 tokens, and the tensors they were computed from."""
    draw = torch.Generator().manual_seed(5)
    lengths = torch.tensor([100, 50, 120, 30])
    ids = torch.repeat_interleave(torch.arange(4), lengths)
    old = -torch.rand(300, generator=draw, dtype=torch.float64)
    tensors = {
        "old_logps": old,
        "logps": old + 0.4 * torch.randn(300, generator=draw, dtype=torch.float64),
        "advantages": torch.tensor([1.0, -0.5, 0.25, 0.0], dtype=torch.float64)[ids],
        "sequence_ids": ids,
    }
    loss = build_loss("sapo", gradient="paper", tau_pos=3.0, tau_neg=4.0)(
        LossInputs(**tensors, num_sequences=4, token_weights=torch.ones(300))
    )
    tensors["gradient_weight"] = loss.gradient_weight
    if rollout:
        tensors["rollout_logps"] = old + 0.05 * torch.randn(300, generator=draw, dtype=torch.float64)
    return policy_metrics(**tensors, num_sequences=4, tau_pos=3.0, tau_neg=4.0), tensors


def test_metrics_are_what_their_names_say() -> None:
    metrics, tensors = step(rollout=True)
    old, now, rollout = (tensors[key] for key in ("old_logps", "logps", "rollout_logps"))
    advantages, weight = tensors["advantages"], tensors["gradient_weight"]
    moved = (now - old) * advantages
    ratio, log_ratio = (now - old).exp(), now - old
    variances = [part.var(correction=0) for part in log_ratio.split([100, 50, 120, 30])]
    bounds = [tau**2 / 4 * variance for tau, variance in zip((3, 4, 3, 4), variances, strict=True)]

    def k3(p: Tensor, q: Tensor) -> Tensor:
        return ((q - p).exp() - 1 - (q - p)).mean()

    expected = {
        "policy/weight_mean_pos": weight[advantages > 0].mean(),
        "policy/weight_mean_neg": weight[advantages < 0].mean(),
        "policy/weight_mean_with": weight[moved > 0].mean(),
        "policy/weight_mean_against": weight[moved < 0].mean(),
        "policy/against_fraction": (moved < 0).double().mean(),
        "policy/weight_below_half": (weight < 0.5).double().mean(),
        "policy/weighted_ratio_max": (weight * ratio).max(),
        "policy/ratio_mean": ratio.mean(),
        "policy/ratio_min": ratio.min(),
        "policy/ratio_max": ratio.max(),
        "policy/ratio_p99": ratio.sort().values[296],
        "policy/outside_clip_fraction": ((ratio < 0.8) | (ratio > 1.2)).double().mean(),
        "policy/kl_old_k1": (old - now).mean(),
        "policy/kl_old_k3": k3(old, now),
        "policy/kl_rollout_k1": (rollout - now).mean(),
        "policy/kl_rollout_k3": k3(rollout, now),
        "mismatch/kl_k1": (rollout - old).mean(),
        "mismatch/kl_k3": k3(rollout, old),
        "policy/log_ratio_var_mean": sum(variances) / 4,
        "policy/log_ratio_var_max": max(variances),
        "policy/sequence_gate_bound": sum(bounds) / 4,
    }
    assert metrics.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            metrics[key], value, rtol=1e-12, atol=1e-14, msg=lambda text, key=key: f"{key}: {text}"
        )
        assert metrics[key].dim() == 0 and not metrics[key].requires_grad


def test_metrics_of_the_rollout_policy_need_its_logprobs() -> None:
    metrics, _ = step(rollout=False)
    assert not any("mismatch" in key or "rollout" in key for key in metrics)


def test_a_runaway_ratio_stays_finite_and_an_empty_step_has_no_metrics() -> None:
    logps = torch.tensor([0.0, -1.0])
    ids = torch.tensor([0, 1])
    shared = {"num_sequences": 2, "tau_pos": 1.0, "tau_neg": 1.05}
    metrics = policy_metrics(
        logps=logps,
        old_logps=torch.tensor([-500.0, -1.0]),
        advantages=torch.ones(2),
        sequence_ids=ids,
        gradient_weight=torch.ones(2),
        **shared,
    )
    assert all(math.isnan(metrics.pop(f"policy/weight_mean_{side}").item()) for side in ("neg", "against"))
    assert all(value.isfinite() for value in metrics.values())
    empty = torch.empty(0)
    nothing = dict.fromkeys(("logps", "old_logps", "advantages", "gradient_weight"), empty)
    assert policy_metrics(**nothing, sequence_ids=ids[:0], **shared) == {}


@pytest.mark.parametrize(
    ("updates", "tau_pos", "tau_neg", "fresh", "word"),
    [
        (1, 1.0, 1.05, True, "inert"),
        (1, 10.0, 12.0, True, "inert"),
        (1, 1.0, 1.05, False, None),
        (4, 1.0, 1.05, True, None),
        (8, 1.0, 1.05, True, None),
        (9, 1.0, 1.05, True, "9 updates"),
        (16, 1.0, 5.0, False, "16 updates"),
        (16, 2.0, 2.0, True, None),
    ],
)
def test_warning_where_the_temperatures_cannot_work(
    updates: int, tau_pos: float, tau_neg: float, fresh: bool, word: str | None
) -> None:
    warning = inert_temperature_warning(updates, tau_pos, tau_neg, fresh_rollouts=fresh)
    assert warning is None if word is None else warning is not None and word in warning
