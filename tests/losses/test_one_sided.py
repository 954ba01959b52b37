"""SAPO's gate on one side, -min(r A, (1 + f(r) - f(1)) A), against plain autograd, the vectors, and its limits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapo_rl.losses import GATES, SAPOPolicyLossFn, clipped_token_losses, one_sided_token_losses, sapo_token_losses

VECTORS = json.loads((Path(__file__).parent / "sapo_vectors.json").read_text())["vectors"]
PLAIN: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sigmoid": lambda r, tau: 4 / tau * torch.sigmoid(tau * (r - 1)),
    "erf": lambda r, tau: (2 + math.sqrt(math.pi / 2) * torch.erf(tau * (r - 1) / math.sqrt(2))) / tau,
    "arctan": lambda r, tau: (2 + torch.atan(tau * (r - 1))) / tau,
    "softsign": lambda r, tau: (2 + tau * (r - 1) / (1 + (tau * (r - 1)) ** 2).sqrt()) / tau,
}
"""f(r) as it is written in the papers."""
gates = pytest.mark.parametrize("gate", GATES)
quick = settings(max_examples=50, deadline=None)
taus = st.floats(0.05, 20)
log_ratios_drawn = st.lists(st.floats(-6, 2), min_size=1, max_size=8)
advantages_drawn = st.floats(-3, 3).filter(lambda value: abs(value) > 1e-3)


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_sided(log_ratios: Tensor, advantage: float, tau: float, gate: str = "sigmoid") -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient in the log-probability and gradient weight of each token."""
    logs = log_ratios.clone().requires_grad_()
    found = one_sided_token_losses(
        logs, torch.full_like(log_ratios, advantage), tau_pos=tau, tau_neg=tau, gate=gate, log_ratio_clamp=20.0
    )
    (gradient,) = torch.autograd.grad(found.losses.sum(), logs)
    return found.losses.detach(), gradient, found.gradient_weight


@gates
@quick
@given(logs=log_ratios_drawn, advantage=advantages_drawn, tau=taus)
def test_it_is_the_minimum_of_the_plain_ratio_and_the_gate(
    gate: str, logs: list[float], advantage: float, tau: float
) -> None:
    plain = float64(logs).requires_grad_()
    ratio, f = plain.exp(), PLAIN[gate]
    gated = 1 + f(ratio, tau) - f(float64(1.0), tau)
    expected = -torch.minimum(ratio * advantage, gated * advantage)
    (slope,) = torch.autograd.grad(expected.sum(), plain)
    loss, gradient, _ = one_sided(float64(logs), advantage, tau, gate)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-11, atol=1e-11 / tau)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-9)


@gates
@quick
@given(logs=log_ratios_drawn, advantage=advantages_drawn, tau=taus)
def test_what_moved_with_its_advantage_is_gated_as_in_the_paper_and_the_rest_is_whole(
    gate: str, logs: list[float], advantage: float, tau: float
) -> None:
    chosen = {"tau_pos": tau, "tau_neg": tau, "gate": gate}
    values, advantages = float64(logs), torch.full((len(logs),), advantage, dtype=torch.float64)
    both = sapo_token_losses(values, values, advantages, **chosen).gradient_weight
    one = sapo_token_losses(values, values, advantages, sides="one", **chosen).gradient_weight
    moved_with = values * advantage > 0
    assert torch.equal(one[moved_with], both[moved_with])
    assert (one[~moved_with] == 1).all() and (both <= 1).all()


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
def test_vector(vector: dict[str, Any]) -> None:
    """The vectors' gate and weight, put together by hand."""
    ratio, advantage, tau = float(vector["ratio"]), vector["advantage"], vector["tau"]
    with_it = ratio > 1 if advantage > 0 else ratio < 1
    bound = vector["log_ratio_clamp"] or 20.0
    inside = abs(vector["logp"] - vector["old_logp"]) <= bound
    objective = 1 + vector["gate_f"] - 2 / tau if with_it else min(ratio, math.exp(bound))
    weighted = (vector["w_times_r"] if with_it else ratio) if inside else 0.0
    logp = torch.tensor([vector["logp"]], dtype=torch.float64, requires_grad=True)
    found = sapo_token_losses(
        logp,
        logp - vector["old_logp"],
        float64([advantage]),
        tau_pos=vector["tau_pos"],
        tau_neg=vector["tau_neg"],
        sides="one",
        log_ratio_clamp=bound,
    )
    found.losses.sum().backward()
    # 1 + f(r) - f(1) loses digits in the vectors' own f where tau is tiny
    assert found.losses.item() == pytest.approx(-objective * advantage, rel=1e-12, abs=1e-14 / tau)
    assert logp.grad is not None
    assert logp.grad.item() == pytest.approx(-weighted * advantage, rel=1e-12, abs=1e-300)


@gates
@pytest.mark.parametrize("advantage", [1.5, -0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_vanishing_tau_leaves_the_plain_ratio(gate: str, advantage: float, dtype: torch.dtype) -> None:
    logs = torch.linspace(-3, 2, 41, dtype=dtype)
    loss, gradient, weight = one_sided(logs, advantage, 1e-5, gate)
    torch.testing.assert_close(loss, -logs.exp() * advantage, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, -logs.exp() * advantage, rtol=1e-5, atol=0)
    torch.testing.assert_close(weight, torch.ones_like(weight), rtol=1e-6, atol=0)


@gates
@pytest.mark.parametrize("advantage", [1.5, -0.5])
def test_an_endless_tau_is_a_clip_of_width_zero(gate: str, advantage: float) -> None:
    logs = torch.linspace(-3, 2, 40, dtype=torch.float64)
    loss, gradient, weight = one_sided(logs, advantage, 1e9, gate)
    clip = clipped_token_losses(logs, torch.full_like(logs, advantage), clip_low=0.0, clip_high=0.0)
    torch.testing.assert_close(loss, clip.losses, rtol=0, atol=1e-8)
    torch.testing.assert_close(weight, clip.gradient_weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, -logs.exp() * clip.gradient_weight * advantage, rtol=1e-12, atol=1e-9)


@gates
def test_at_ratio_one_it_is_the_policy_gradient(gate: str) -> None:
    zeros = torch.zeros(1, dtype=torch.float64)
    for advantage in (2.0, -2.0):
        loss, gradient, weight = one_sided(zeros, advantage, 3.0, gate)
        assert (loss.item(), gradient.item(), weight.item()) == (-advantage, -advantage, 1.0)


@gates
def test_float32_keeps_its_digits_in_the_tail_and_near_one(gate: str) -> None:
    """Far out autograd must not subtract numbers that nearly agree; near 1 the value must not either."""
    tau = 0.001
    near = torch.tensor([1e-3, 1e-4])
    loss, _, _ = one_sided(near, 1.0, tau, gate)
    torch.testing.assert_close(loss.double(), -near.double().exp(), rtol=1e-6, atol=0)
    far = torch.tensor([0.5, 1.0, 1.5, 2.0])
    _, gradient, _ = one_sided(far, 1.0, 6.0, gate)
    _, exact, _ = one_sided(far.double(), 1.0, 6.0, gate)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-35)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@gates
def test_runaway_ratios_stay_finite(gate: str, advantage: float, dtype: torch.dtype) -> None:
    logs = torch.tensor([-800.0, -19.0, 19.0, 800.0], dtype=dtype)
    for tau in (0.01, 1.0, 500.0):
        loss, gradient, weight = one_sided(logs, advantage, tau, gate)
        assert loss.isfinite().all() and gradient.isfinite().all() and weight.isfinite().all()
        assert gradient[0] == gradient[3] == 0


@quick
@given(logs=log_ratios_drawn, advantage=advantages_drawn, tau=taus, bound=st.floats(1.01, 20))
def test_dual_clip_takes_the_gradient_of_bad_tokens_that_have_become_that_much_likelier(
    logs: list[float], advantage: float, tau: float, bound: float
) -> None:
    values, advantages = float64(logs), torch.full((len(logs),), advantage, dtype=torch.float64)
    chosen: dict[str, Any] = {"tau_pos": tau, "tau_neg": tau, "sides": "one"}
    plain = sapo_token_losses(values, values, advantages, **chosen)
    found = sapo_token_losses(values, values, advantages, dual_clip=bound, **chosen)
    beyond = (advantages < 0) & (values.exp() > bound)
    assert torch.equal(found.losses[~beyond], plain.losses[~beyond])
    assert torch.equal(found.gradient_weight[~beyond], plain.gradient_weight[~beyond])
    assert (found.gradient_weight[beyond] == 0).all()
    assert torch.equal(found.losses[beyond], (-bound * advantages)[beyond])


def test_dual_clip_is_differentiated_as_its_weight_says() -> None:
    logps = float64([-1.0, 0.5, 2.0, 2.0]).requires_grad_()
    advantages = float64([-2.0, -2.0, -2.0, 2.0])
    found = sapo_token_losses(logps, logps, advantages, tau_pos=4.0, tau_neg=4.0, sides="one", dual_clip=3.0)
    found.losses.sum().backward()
    assert logps.grad is not None
    expected = -advantages * logps.detach().exp() * found.gradient_weight
    torch.testing.assert_close(logps.grad, expected, rtol=1e-12, atol=0)
    assert logps.grad[2] == 0 < logps.grad[1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dual_clip": 3.0}, "needs sides 'one', found 'both'"),
        ({"sides": "one", "gradient": "paper", "dual_clip": 1.0}, "above 1 or null, found 1.0"),
    ],
)
def test_dual_clip_that_cannot_be_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SAPOPolicyLossFn(**settings)


def test_both_sides_are_the_default_and_the_paper() -> None:
    assert SAPOPolicyLossFn().sides == "both"
    logs, advantages = float64([-1.0, 0.5, 2.0]), float64([1.0, 1.0, -1.0])
    taus = {"tau_pos": 1.0, "tau_neg": 1.05}
    default = sapo_token_losses(logs, logs, advantages, **taus)
    named = sapo_token_losses(logs, logs, advantages, sides="both", **taus)
    assert torch.equal(default.losses, named.losses) and torch.equal(default.gradient_weight, named.gradient_weight)
