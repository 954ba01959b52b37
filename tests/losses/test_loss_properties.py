"""What must hold for every loss of the family on any batch (hypothesis), in float64."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses.batches import SETTINGS, Batch, inputs_of, loss_and_gradient, make_batch, permuted

from sapo_rl.losses import (
    AGGREGATION_MODES,
    GATES,
    POLICY_LOSS_FN,
    build_loss,
    by_sign,
    gate_value,
    gate_weight,
    half_weight_distance,
)

quick = settings(max_examples=25, deadline=None)
unhurried = settings(deadline=None)
seeds = st.integers(0, 2**31)
lengths = st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(lambda rows: sum(rows) > 0)
modes = st.sampled_from(AGGREGATION_MODES)
taus = st.floats(0.05, 20)
names = pytest.mark.parametrize("name", SETTINGS)
gates = pytest.mark.parametrize("gate", GATES)
NO_DERIVATIVE = ("sapo-detached", "cispo", "vespo", "dppo", "dppo_kl", "cppo", "m2po")
"""Losses with a factor that is held constant, or that jumps at a bound: their gradient is not that of their value."""
WITH_KL = {"kl": {"coef": 0.1, "kind": "k3"}}


def assert_same(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def whole(batch: Batch) -> list[list[int]]:
    return [list(range(len(batch.lengths)))]


@gates
@unhurried
@given(tau=taus)
def test_every_gate_is_two_over_tau_and_of_slope_one_on_policy(gate: str, tau: float) -> None:
    one, temperature = torch.ones((), dtype=torch.float64), torch.tensor(tau, dtype=torch.float64)
    assert gate_value(one, temperature, gate).item() == pytest.approx(2 / tau, rel=1e-14)
    assert gate_weight(one, temperature, gate).item() == 1.0
    half = 1 + half_weight_distance(tau, gate)
    assert gate_weight(torch.tensor(half, dtype=torch.float64), temperature, gate).item() == pytest.approx(
        0.5, rel=1e-9
    )


@gates
@unhurried
@given(tau=taus, ratio=st.floats(1e-3, 6))
def test_weight_is_the_gates_slope(gate: str, tau: float, ratio: float) -> None:
    at = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(tau, dtype=torch.float64)
    (slope,) = torch.autograd.grad(gate_value(at, temperature, gate), at)
    weight = gate_weight(at.detach(), temperature, gate)
    assert_same(slope, weight)
    step = 1e-5 / tau
    higher, lower = (gate_value(at.detach() + sign * step, temperature, gate) for sign in (1, -1))
    torch.testing.assert_close((higher - lower) / (2 * step), weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in NO_DERIVATIVE])
@quick
@given(rows=lengths, seed=seeds, mode=modes)
def test_gradient_agrees_with_finite_differences(name: str, rows: list[int], seed: int, mode: str) -> None:
    batch = make_batch(rows, seed)
    loss_fn = build_loss(**({"name": name} | SETTINGS[name] | WITH_KL))
    # the clipped losses have kinks: a difference taken across one is no derivative
    step, kinks = 1e-6, torch.tensor([0.8, 0.92, 0.95, 1.05, 1.08, 1.2, 1.28, 1.5], dtype=torch.float64).log()
    kinks = torch.cat([kinks, torch.tensor([-0.2, 0.3], dtype=torch.float64)])  # gmpo's are those of the logarithm
    by_token = batch.logps - batch.old_logps
    by_sequence = [part.mean() for part in by_token.split(rows) if len(part)]
    ratios = torch.cat([by_token, torch.stack(by_sequence)])
    if ((ratios.unsqueeze(-1) - kinks).abs() < 10 * step).any():
        return
    everything = whole(batch)[0]
    torch.autograd.gradcheck(
        lambda logps: loss_fn(inputs_of(batch, logps, everything, mode)).loss,
        (batch.logps.clone().requires_grad_(),),
        eps=step,
        atol=1e-7,
        rtol=1e-5,
    )


@names
@quick
@given(rows=lengths, seed=seeds, mode=modes, drift=st.sampled_from([0.1, 1.0, 30.0]))
def test_gradient_weight_is_what_is_left_of_the_plain_gradient(
    name: str, rows: list[int], seed: int, mode: str, drift: float
) -> None:
    batch = make_batch(rows, seed, drift)
    chosen = {"name": name} | SETTINGS[name]
    inputs = inputs_of(batch, batch.logps.clone().requires_grad_(), whole(batch)[0], mode)
    outputs = build_loss(**chosen)(inputs)
    (gradient,) = torch.autograd.grad(outputs.loss, inputs.logps)
    log_ratios = batch.logps - batch.old_logps
    if name in ("gspo", "gmpo") or name.endswith("-sequence"):
        log_ratios = torch.cat([part.mean().expand(len(part)) for part in log_ratios.split(rows) if len(part)])
    ratio = log_ratios.clamp(-20, 20).exp()
    expected = -batch.advantages * ratio * outputs.gradient_weight * inputs.token_weights
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12)
    assert not outputs.gradient_weight.requires_grad


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "sapo-detached"])
@given(rows=lengths, seed=seeds, mode=modes)
@quick
def test_on_policy_every_loss_has_the_policy_gradient(name: str, rows: list[int], seed: int, mode: str) -> None:
    batch = make_batch(rows, seed, drift=0.0)
    _, gradient = loss_and_gradient(batch, whole(batch), mode, name)
    weights = inputs_of(batch, batch.logps, whole(batch)[0], mode).token_weights
    assert_same(gradient, -batch.advantages * weights, 1e-15)


@quick
@given(rows=lengths, seed=seeds, mode=modes, tau=st.tuples(taus, taus).map(sorted))
def test_detached_is_two_over_tau_times_the_policy_gradient_on_policy(
    rows: list[int], seed: int, mode: str, tau: list[float]
) -> None:
    batch = make_batch(rows, seed, drift=0.0)
    low, high = tau
    _, gradient = loss_and_gradient(batch, whole(batch), mode, "sapo-detached", tau_pos=low, tau_neg=high)
    weights = inputs_of(batch, batch.logps, whole(batch)[0], mode).token_weights
    assert_same(gradient, -batch.advantages * weights * 2 / by_sign(batch.advantages, low, high), 1e-13)


@names
@quick
@given(rows=lengths, seed=seeds, mode=modes, shuffle=st.randoms(use_true_random=False))
def test_order_of_sequences_is_immaterial(
    name: str, rows: list[int], seed: int, mode: str, shuffle: random.Random
) -> None:
    batch = make_batch(rows, seed)
    order = list(range(len(rows)))
    shuffle.shuffle(order)
    loss, gradient = loss_and_gradient(batch, whole(batch), mode, name, **WITH_KL)
    other_loss, other_gradient = loss_and_gradient(permuted(batch, order), whole(batch), mode, name, **WITH_KL)
    assert_same(other_loss, loss)
    assert_same(other_gradient, gradient[batch.tokens_of(order)])


@names
@quick
@given(rows=lengths, seed=seeds, mode=modes, data=st.data())
def test_cut_into_micro_batches_is_immaterial(
    name: str, rows: list[int], seed: int, mode: str, data: st.DataObject
) -> None:
    batch = make_batch(rows, seed)
    part_of = data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    parts = [[row for row, part in enumerate(part_of) if part == wanted] for wanted in range(4)]
    correction = {"correction": {"mode": "sequence_mask", "low": 0.9, "high": 1.1, "stale_negative_kl": 0.2}}
    expected = loss_and_gradient(batch, whole(batch), mode, name, **WITH_KL, **correction)
    found = loss_and_gradient(batch, parts, mode, name, **WITH_KL, **correction)
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])


@names
@quick
@given(rows=lengths, seed=seeds, mode=modes)
def test_packed_and_padded_layouts_agree(name: str, rows: list[int], seed: int, mode: str) -> None:
    batch = make_batch(rows, seed)
    mask = torch.arange(max(rows)) < batch.lengths.unsqueeze(-1)
    chosen = {"name": name} | SETTINGS[name]

    def padded(packed: torch.Tensor) -> torch.Tensor:
        return torch.full(mask.shape, float("nan"), dtype=torch.float64).masked_scatter(mask, packed)

    logp = padded(batch.logps).requires_grad_()
    policy = POLICY_LOSS_FN.get(chosen.pop("name"))(loss_agg_mode=mode, loss_agg_norm=16.0, **chosen)
    loss, _ = policy(logp, padded(batch.old_logps), mask, padded(batch.advantages))
    loss.backward()
    expected_loss, expected_gradient = loss_and_gradient(batch, whole(batch), mode, name)
    # the padded call keeps the published class's sum, which is not divided by the number of sequences
    factor = len(rows) if mode == "seq-mean-token-sum-norm" else 1
    assert_same(loss.detach(), expected_loss * factor)
    assert_same(logp.grad[mask], expected_gradient * factor)
    assert (logp.grad[~mask] == 0).all()


@unhurried
@given(
    log_ratios=st.lists(st.floats(-3, 3), min_size=1, max_size=30),
    tau=st.floats(0.1, 15),
)
def test_linearised_gate_obeys_the_papers_sequence_bound(log_ratios: list[float], tau: float) -> None:
    values = torch.tensor(log_ratios, dtype=torch.float64)
    temperature = torch.tensor(tau, dtype=torch.float64)
    tokens = gate_weight(1 + values, temperature).mean()
    sequence = gate_weight(1 + values.mean(), temperature)
    assert (tokens - sequence).abs() <= tau**2 / 4 * values.var(correction=0) + 1e-12
