"""What a gate lets through, against a plain calculation, and the scale of the temperatures that keeps to a budget."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses.batches import ALONE, inputs_of, make_batch

from sapo_rl.losses import GATES, LARGEST_SCALE, GatedKL, LossInputs, Reduction, build_loss

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
gates = st.sampled_from(sorted(GATES))
sides = st.sampled_from(["both", "one"])
drifts = st.sampled_from([0.01, 0.3, 2.0])
LENGTHS = [4, 1, 5, 3]


def tokens(seed: int, drift: float) -> LossInputs:
    batch = make_batch(LENGTHS, seed, drift)
    return inputs_of(batch, batch.logps, [0, 1, 2, 3], "token-mean")


def gated(inputs: LossInputs, across: Reduction = ALONE, **choices: Any) -> GatedKL:
    settings = {"tau_pos": 1.5, "tau_neg": 2.0} | choices
    packed = (inputs.logps, inputs.old_logps, inputs.advantages, inputs.sequence_ids, inputs.num_sequences)
    return GatedKL(*packed, **settings, across=across)


def at(drift: GatedKL, scale: float) -> float:
    return drift(torch.tensor(scale, dtype=torch.float64)).item()


@quick
@given(seed=seeds, drift=drifts, gate=gates, level=st.sampled_from(["token", "sequence"]), scale=st.floats(1, 64))
def test_it_is_the_mean_of_the_losss_own_weights_times_the_kl(
    seed: int, drift: float, gate: str, level: str, scale: float
) -> None:
    inputs = tokens(seed, drift)
    outputs = build_loss(
        "sapo", gradient="paper", gate=gate, ratio_level=level, tau_pos=1.5 * scale, tau_neg=2.0 * scale
    )(inputs)
    kl = sum(
        weight * (math.exp(now - old) - 1 - (now - old))
        for weight, now, old in zip(
            outputs.gradient_weight.tolist(), inputs.logps.tolist(), inputs.old_logps.tolist(), strict=True
        )
    )
    assert at(gated(inputs, gate=gate, ratio_level=level), scale) == pytest.approx(kl / sum(LENGTHS), rel=1e-9)


def test_on_one_side_only_what_has_moved_with_its_advantage_counts() -> None:
    inputs = tokens(3, 0.5)
    outputs = build_loss("sapo", gradient="paper", sides="one", tau_pos=1.5, tau_neg=2.0)(inputs)
    moved = inputs.logps - inputs.old_logps
    parts = outputs.gradient_weight * (moved.exp() - 1 - moved)
    assert (moved * inputs.advantages > 0).any() and (moved * inputs.advantages < 0).any()
    expected = parts[moved * inputs.advantages > 0].sum() / len(moved)
    assert at(gated(inputs, sides="one"), 1.0) == pytest.approx(expected.item(), rel=1e-10)


@quick
@given(seed=seeds, drift=drifts, gate=gates, side=sides)
def test_it_falls_as_the_temperatures_rise(seed: int, drift: float, gate: str, side: str) -> None:
    measured = gated(tokens(seed, drift), gate=gate, sides=side)
    found = [at(measured, scale) for scale in (1, 1.5, 2, 4, 8, 16, 32, 64)]
    assert found == sorted(found, reverse=True)


@quick
@given(seed=seeds, drift=drifts, gate=gates, side=sides, share=st.floats(0.001, 2))
def test_the_scale_keeps_it_to_the_budget_within_its_bounds(
    seed: int, drift: float, gate: str, side: str, share: float
) -> None:
    measured = gated(tokens(seed, drift), gate=gate, sides=side)
    least, most = at(measured, LARGEST_SCALE), at(measured, 1.0)
    target = max(share * most, 1e-12)
    scale = measured.scale(target).item()
    if most <= target:
        assert scale == 1
    elif least > target:
        assert scale == LARGEST_SCALE
    else:
        assert 1 <= scale <= LARGEST_SCALE
        assert at(measured, scale) == pytest.approx(target, rel=1e-6)


@quick
@given(seed=seeds, drift=drifts, lower=st.floats(0.01, 1), higher=st.floats(0.01, 1))
def test_a_smaller_budget_never_has_lower_temperatures(seed: int, drift: float, lower: float, higher: float) -> None:
    measured = gated(tokens(seed, drift))
    small, large = sorted(share * at(measured, 1.0) for share in (lower, higher))
    assert measured.scale(small).item() >= measured.scale(large).item()


def test_nothing_moved_and_nothing_there_leave_the_temperatures_as_they_are() -> None:
    still = tokens(0, 0.0)
    assert gated(still).scale(1e-6).item() == 1
    nothing = torch.zeros(0, dtype=torch.float64)
    empty = GatedKL(nothing, nothing, nothing, torch.zeros(0, dtype=torch.int64), 0, tau_pos=1.0, tau_neg=1.05)
    assert (empty.tokens.item(), at(empty, 1.0), empty.scale(0.1).item()) == (0, 0, 1)


def test_runaway_ratios_stay_finite() -> None:
    old = torch.zeros(3, dtype=torch.float64)
    far = torch.tensor([100.0, -100.0, 0.5], dtype=torch.float64)
    measured = GatedKL(far, old, torch.ones(3), torch.tensor([0, 1, 2]), 3, tau_pos=1.0, tau_neg=1.05)
    assert math.isfinite(at(measured, 1.0)) and math.isfinite(measured.scale(0.01).item())
