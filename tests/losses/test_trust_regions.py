"""M2PO and CPPO against their papers' algorithms, token by token in plain Python on padded rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses.batches import Batch, inputs_of, make_batch
from torch import Tensor

from sapo_rl.losses import build_loss, second_moment_limit

quick = settings(max_examples=25, deadline=None)
lengths = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda rows: sum(rows) > 0)
seeds = st.integers(0, 2**31)


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def padded(batch: Batch, packed: Tensor) -> Tensor:
    mask = torch.arange(int(batch.lengths.max())) < batch.lengths.unsqueeze(-1)
    return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, packed)


def masked_objective(batch: Batch, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Minus the mean of M r A over all tokens of the padded rows, and its gradient at the packed tokens."""
    mask = torch.arange(keep.shape[1]) < batch.lengths.unsqueeze(-1)
    logps = padded(batch, batch.logps).requires_grad_()
    ratio = (logps - padded(batch, batch.old_logps)).exp()
    loss = -(keep * ratio * padded(batch, batch.advantages))[mask].sum() / batch.lengths.sum()
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.detach(), gradient[mask]


def algorithm_of_m2po(batch: Batch, threshold: float) -> Tensor:
    """Algorithm 1: while the mean of M2 over the trust-region tokens is too large, the largest goes."""
    log_ratio, advantage = padded(batch, batch.logps - batch.old_logps), padded(batch, batch.advantages)
    keep = torch.ones_like(log_ratio)
    region = {tuple(place): log_ratio[tuple(place)] ** 2 for place in (log_ratio * advantage > 0).nonzero().tolist()}
    while region and sum(region.values()) / len(region) > threshold:
        largest = max(region, key=lambda place: float(region[place]))
        keep[largest] = 0.0
        del region[largest]
    return keep


@quick
@given(rows=lengths, seed=seeds, threshold=st.floats(0.001, 0.5), drift=st.sampled_from([0.1, 0.5, 2.0]))
def test_m2po_is_the_papers_algorithm(rows: list[int], seed: int, threshold: float, drift: float) -> None:
    batch = make_batch(rows, seed, drift)
    logps = batch.logps.clone().requires_grad_()
    inputs = inputs_of(batch, logps, list(range(len(rows))), "token-mean")
    outputs = build_loss("m2po", m2_threshold=threshold)(inputs)
    (gradient,) = torch.autograd.grad(outputs.loss, logps)
    keep = algorithm_of_m2po(batch, threshold)
    expected, reference = masked_objective(batch, keep)
    mask = torch.arange(keep.shape[1]) < batch.lengths.unsqueeze(-1)
    assert torch.equal(outputs.gradient_weight, keep[mask])
    torch.testing.assert_close(outputs.loss.detach(), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-14)


def test_the_limit_lies_between_what_is_out_and_what_is_left() -> None:
    """Squares 0.01, 0.04, 0.09 and 1: without the last their mean is 0.14 / 3, without the last two 0.025.

    A token within the threshold is always left, so that the limit is above the threshold too.
    """
    log_ratios, advantages = float64(0.1, -0.2, 0.3, -1.0, 5.0, -5.0, 3.0), float64(1, -1, 1, -1, -1, 1, 0)
    for threshold, limit in ((0.286, math.inf), (0.05, 0.545), (0.046, 0.068), (0.008, 0.009)):
        found = second_moment_limit(log_ratios, advantages, threshold=threshold)
        assert found.item() == pytest.approx(limit), threshold
    nothing = second_moment_limit(float64(), float64(), threshold=0.04)
    assert nothing.item() == math.inf and nothing.dtype == torch.float64


def test_equal_tokens_at_the_edge_go_together() -> None:
    """0.01, 1 and 1: the mean is within 0.6 without one of the two, and which one is for no order to say."""
    found = second_moment_limit(float64(0.1, 1.0, 1.0), float64(1, 1, 1), threshold=0.6)
    kept = build_loss("m2po", m2_threshold=0.6).policy.token_losses(
        float64(0.1, 1.0, 1.0), float64(0.1, 1.0, 1.0), float64(1, 1, 1)
    )
    assert found.item() == 1.0
    assert kept.gradient_weight.tolist() == [1.0, 0.0, 0.0]


def test_a_micro_batch_is_masked_by_what_the_whole_batch_has_drifted() -> None:
    """The first sequence alone is within the threshold on the whole batch's terms only."""
    batch = replace(
        make_batch([1, 9], seed=0),
        logps=float64(0.3, *[0.01] * 9),
        old_logps=float64(*[0.0] * 10),
        advantages=float64(*[1.0] * 10),
    )
    loss, first = build_loss("m2po"), inputs_of(batch, batch.logps, [0], "token-mean")
    assert loss(first).gradient_weight.tolist() == [0.0]
    limit = second_moment_limit(batch.logps, batch.advantages, threshold=0.04)
    assert loss(replace(first, limit=limit)).gradient_weight.tolist() == [1.0]


def algorithm_of_cppo(batch: Batch, low: float, high: float, budget: float, floor: float) -> Tensor:
    """Algorithm 1, row by row."""
    old, now, advantage = (padded(batch, one).tolist() for one in (batch.old_logps, batch.logps, batch.advantages))
    keep = torch.ones(len(old), len(old[0]), dtype=torch.float64)
    for row, length in enumerate(batch.lengths.tolist()):
        drifted = weighed = 0.0
        for t in range(length):
            weight = 1 - (1 - floor) / (length - 1) * t if length > 1 else 1.0
            score = weight * abs(math.exp(now[row][t]) - math.exp(old[row][t]))
            delta = high if advantage[row][t] > 0 else low
            threshold = min(delta, delta + budget * weighed - drifted)
            towards = advantage[row][t] * (math.exp(now[row][t] - old[row][t]) - 1) <= 0
            keep[row, t] = float(towards or score <= threshold)
            drifted, weighed = drifted + score, weighed + weight
    return keep


@quick
@given(
    rows=lengths,
    seed=seeds,
    deltas=st.tuples(st.floats(0.01, 0.3), st.floats(0.01, 0.3)),
    budget=st.floats(0, 0.2),
    floor=st.floats(0.1, 1),
)
def test_cppo_is_the_papers_algorithm(
    rows: list[int], seed: int, deltas: tuple[float, float], budget: float, floor: float
) -> None:
    low, high = deltas
    batch = make_batch(rows, seed)
    logps = batch.logps.clone().requires_grad_()
    inputs = inputs_of(batch, logps, list(range(len(rows))), "token-mean")
    loss = build_loss("cppo", clip_low=low, clip_high=high, prefix_budget=budget, weight_floor=floor)
    outputs = loss(inputs)
    (gradient,) = torch.autograd.grad(outputs.loss, logps)
    keep = algorithm_of_cppo(batch, low, high, budget, floor)
    mask = torch.arange(keep.shape[1]) < batch.lengths.unsqueeze(-1)
    expected, reference = masked_objective(batch, keep)
    assert torch.equal(outputs.gradient_weight, keep[mask])
    torch.testing.assert_close(outputs.loss.detach(), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-14)


def test_cppo_without_prefix_or_positions_is_dppo() -> None:
    """A budget that never binds and weights of 1 leave the bound of each token."""
    batch = make_batch([9, 1, 5], seed=3)
    inputs = inputs_of(batch, batch.logps, [0, 1, 2], "seq-mean-token-mean")
    alike = build_loss("cppo", clip_low=0.05, clip_high=0.08, prefix_budget=1.0, weight_floor=1.0)(inputs)
    expected = build_loss("dppo", clip_low=0.05, clip_high=0.08)(inputs)
    assert torch.equal(alike.gradient_weight, expected.gradient_weight)
    assert 0 < alike.gradient_weight.sum() < len(batch.logps)
    torch.testing.assert_close(alike.loss, expected.loss, rtol=1e-14, atol=0)


def test_cppo_lets_less_through_after_a_prefix_that_has_drifted() -> None:
    """Tokens that lose 0.1 each: with a budget of 0.02 the second is over it; one after a quiet prefix is not."""
    old = float64(0.5, 0.5, 0.5).log()
    loss = build_loss("cppo", weight_floor=1.0).policy
    ids = torch.zeros(3, dtype=torch.int64)
    for now, kept in (((0.4, 0.4, 0.4), [1, 0, 0]), ((0.5, 0.5, 0.4), [1, 1, 1]), ((0.4, 0.46, 0.5), [1, 1, 1])):
        assert loss.packed(float64(*now).log(), old, float64(-1, -1, -1), ids, 1).gradient_weight.tolist() == kept
