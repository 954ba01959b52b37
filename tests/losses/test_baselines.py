"""DPPO, GMPO and VESPO against torch's own distributions and the papers' formulas, token by token in plain Python."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses.batches import inputs_of, make_batch
from torch import Tensor
from torch.distributions import Bernoulli, Gamma, kl_divergence

from sapo_rl.losses import LossInputs, binary_kl, binary_tv, build_loss, dppo_token_losses, vespo_token_losses

quick = settings(max_examples=50, deadline=None)
probabilities = st.floats(1e-6, 1 - 1e-6)


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@quick
@given(p=probabilities, q=probabilities)
def test_divergences_are_those_of_two_bernoulli_variables(p: float, q: float) -> None:
    old, now = float64(p), float64(q)
    exact = kl_divergence(Bernoulli(old), Bernoulli(now))
    torch.testing.assert_close(binary_kl(old.log(), now.log()), exact, rtol=1e-8, atol=1e-11)
    both = torch.stack([old - now, (1 - old) - (1 - now)])
    torch.testing.assert_close(binary_tv(old.log(), now.log()), both.abs().sum(0) / 2, rtol=1e-9, atol=1e-12)


def test_a_certain_token_has_a_divergence_that_is_no_nan() -> None:
    certain, likely = torch.zeros(1), torch.tensor([0.9]).log()
    assert binary_kl(certain, certain).item() == 0
    assert binary_kl(likely, certain).item() == math.inf
    assert binary_kl(certain, likely).item() == pytest.approx(-math.log(0.9), rel=1e-6)


@pytest.mark.parametrize(
    ("old", "now", "advantage", "kept"),
    [
        (0.60, 0.90, 1.0, False),  # moved with its advantage, too far
        (0.60, 0.30, 1.0, True),  # moved against it: what brings it back
        (0.60, 0.30, -1.0, False),
        (0.60, 0.90, -1.0, True),
        (0.60, 0.75, 1.0, True),  # within the bound
        (0.60, 0.45, -1.0, True),
        (1e-5, 1e-3, 1.0, True),  # a ratio of 100, of next to no probability
        (0.99, 0.70, -1.0, False),  # a ratio of 0.71, of much
    ],
)
def test_dppo_masks_large_moves_with_the_advantage_only(old: float, now: float, advantage: float, kept: bool) -> None:
    logps = float64(math.log(now)).requires_grad_()
    found = dppo_token_losses(
        logps, logps - math.log(old), float64(advantage), divergence="tv", clip_low=0.2, clip_high=0.2
    )
    (gradient,) = torch.autograd.grad(found.losses.sum(), logps)
    assert found.gradient_weight.item() == float(kept)
    assert gradient.item() == pytest.approx(-advantage * now / old * kept)


@quick
@given(seed=st.integers(0, 2**31), low=st.floats(0.001, 0.3), high=st.floats(0.001, 0.3))
@pytest.mark.parametrize("name", ["dppo", "dppo_kl"])
def test_dppo_is_the_papers_formula(name: str, seed: int, low: float, high: float) -> None:
    batch = make_batch([4, 1, 5, 3], seed)
    batch = replace(batch, logps=batch.logps.clamp(max=-0.01))
    inputs = inputs_of(batch, batch.logps.clone().requires_grad_(), [0, 1, 2, 3], "token-mean")
    outputs = build_loss(name, clip_low=low, clip_high=high)(inputs)
    expected, masks = [], []
    for logp, old_logp, advantage in zip(batch.logps, batch.old_logps, batch.advantages, strict=True):
        p, q = old_logp.exp(), logp.exp()
        distance = kl_divergence(Bernoulli(p), Bernoulli(q)) if name == "dppo_kl" else (p - q).abs()
        outside = distance > (high if advantage > 0 else low)
        away = q > p if advantage > 0 else q < p
        masks.append(float(not (outside and away)))
        expected.append(-masks[-1] * (q / p) * advantage)
    torch.testing.assert_close(outputs.gradient_weight, float64(*masks))
    torch.testing.assert_close(outputs.loss.detach(), torch.stack(expected).mean())


@quick
@given(seed=st.integers(0, 2**31), low=st.floats(0.001, 0.5), high=st.floats(0.001, 0.5))
def test_gmpo_is_the_papers_formula(seed: int, low: float, high: float) -> None:
    """(prod of min(r^s, clip(r, e^-low, e^high)^s)^s)^(1 / length) A, where s is the sign of A; a product of ratios."""
    batch = make_batch([4, 1, 5, 3], seed)
    logps = batch.logps.clone().requires_grad_()
    inputs = inputs_of(batch, logps, [0, 1, 2, 3], "seq-mean-token-mean")
    outputs = build_loss("gmpo", clip_low=low, clip_high=high)(inputs)
    other = batch.logps.clone().requires_grad_()
    terms = []
    for sequence in range(4):
        tokens = batch.sequence_ids == sequence
        ratio, advantage = other[tokens].exp() / batch.old_logps[tokens].exp(), batch.advantages[tokens][0]
        sign = advantage.sign()
        clipped = ratio.clamp(math.exp(-low), math.exp(high))
        product = (torch.minimum(ratio**sign, clipped**sign) ** sign).prod()
        terms.append(-(product ** (1 / len(ratio))) * advantage)
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(outputs.loss, expected)
    (gradient,) = torch.autograd.grad(outputs.loss, logps)
    (reference,) = torch.autograd.grad(expected, other)
    torch.testing.assert_close(gradient, reference)


def vespo_inputs() -> LossInputs:
    batch = make_batch([4, 1, 5, 3], seed=7)
    return inputs_of(batch, batch.logps.clone().requires_grad_(), [0, 1, 2, 3], "token-mean")


def test_vespos_weight_is_a_gamma_density_of_the_completions_whole_ratio() -> None:
    """W^k exp(lambda (1 - W)) is the density of Gamma(k + 1, lambda), over its value at 1."""
    inputs = vespo_inputs()
    outputs = build_loss("vespo")(inputs)
    (gradient,) = torch.autograd.grad(outputs.loss, inputs.logps)
    expected = []
    for sequence in range(4):
        tokens = inputs.sequence_ids == sequence
        whole = (inputs.logps.detach()[tokens].exp() / inputs.old_logps[tokens].exp()).prod()
        shape, rate = (3.0, 3.0) if inputs.advantages[tokens][0] > 0 else (4.0, 2.0)
        density = Gamma(float64(shape), float64(rate))
        phi = (density.log_prob(whole) - density.log_prob(float64(1.0))).exp()
        expected.append(-phi * inputs.advantages[tokens] / 13)
    torch.testing.assert_close(gradient, torch.cat(expected))


def test_vespo_fades_at_both_ends_and_peaks_at_k_over_lambda() -> None:
    logs = torch.linspace(-25, 25, 2001, dtype=torch.float64)
    settings = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}
    for advantage, peak in ((1.0, 2 / 3), (-1.0, 3 / 2)):
        found = vespo_token_losses(torch.ones_like(logs), logs, logs, torch.full_like(logs, advantage), **settings)
        phi = -found.losses * advantage
        assert phi.isfinite().all() and found.gradient_weight.isfinite().all()
        assert logs[phi.argmax()].exp().item() == pytest.approx(peak, rel=0.03)
        assert phi[0] < 1e-15 and phi[-1] == 0
        assert phi[1000].item() == pytest.approx(1, rel=1e-12)
