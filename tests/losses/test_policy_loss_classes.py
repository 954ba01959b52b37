"""The padded class API: names, defaults, refusals, accepted shapes, reported metrics."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sapo_rl.config.loss import LossConfig
from sapo_rl.errors import UserError
from sapo_rl.losses import (
    POLICY_LOSS_FN,
    LossInputs,
    PolicyLossFn,
    SAPOPolicyLossFn,
    TokenLosses,
    aggregate_loss,
    build_loss,
    masked_mean,
)
from sapo_rl.policy.trainer import objective


def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logp = torch.tensor([[-0.5, -1.0, -2.0], [-0.7, -0.2, -9.0]], dtype=torch.float64)
    old = torch.tensor([[-0.6, -1.0, -1.5], [-0.7, -0.9, -1.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    return logp, old, mask, torch.tensor([1.5, -0.5], dtype=torch.float64)


def test_registry_names_the_family_and_lists_it_for_an_unknown_name() -> None:
    assert POLICY_LOSS_FN.get("sapo") is SAPOPolicyLossFn
    with pytest.raises(KeyError) as error:
        POLICY_LOSS_FN.get("sapoo")
    for name in ("sapo", "grpo", "gspo", "cispo", "reinforce"):
        assert name in str(error.value)


def test_defaults_are_those_of_the_published_class() -> None:
    published = {"tau_pos": 1.0, "tau_neg": 1.05, "loss_agg_mode": "token-mean"}
    assert SAPOPolicyLossFn.default_args() == published
    loss = SAPOPolicyLossFn()
    assert {key: getattr(loss, key) for key in published} == published
    assert (loss.backend, loss.gradient, loss.gate, loss.log_ratio_clamp) == ("verl", "detached", "sigmoid", 20.0)
    assert SAPOPolicyLossFn("verl", 1.0, 1.05).tau_neg == 1.05


def test_soft_gate_takes_its_temperature_from_the_advantages_sign() -> None:
    ratio = torch.tensor([[0.5, 1.0, 2.0]] * 3, dtype=torch.float64)
    advantages = torch.tensor([[1.0], [0.0], [-1.0]], dtype=torch.float64)
    gate = SAPOPolicyLossFn(tau_pos=2.0, tau_neg=3.0).soft_gate_function(ratio, advantages)
    for row, tau in zip(gate, (2.0, 3.0, 3.0), strict=True):
        expected = [4 / tau / (1 + math.exp(-tau * (r - 1))) for r in (0.5, 1.0, 2.0)]
        torch.testing.assert_close(row.tolist(), expected, rtol=1e-14, atol=0)


def test_detached_loss_is_the_aggregate_of_the_constant_gate_times_logprob() -> None:
    logp, old, mask, advantages = example()
    sapo = SAPOPolicyLossFn()
    gate = sapo.soft_gate_function((logp - old).exp(), advantages.unsqueeze(-1))
    expected = (-advantages.unsqueeze(-1) * gate * logp)[mask.bool()].mean()
    torch.testing.assert_close(sapo(logp, old, mask, advantages)[0], expected, rtol=1e-13, atol=0)


def test_metrics_are_masked_means_as_plain_floats() -> None:
    logp, old, mask, advantages = example()
    _, metrics = SAPOPolicyLossFn()(logp, old, mask, advantages, ignored="column")
    live = mask.bool()
    ratio = (logp - old).exp()
    assert all(type(value) is float for value in metrics.values())
    assert metrics["ppo_kl"] == pytest.approx((old - logp)[live].mean().item(), rel=1e-13)
    assert metrics["avg_ratio"] == pytest.approx(ratio[live].mean().item(), rel=1e-13)
    assert metrics["pos_adv_frac"] == pytest.approx(3 / 5, rel=1e-13)
    gate = SAPOPolicyLossFn().soft_gate_function(ratio, advantages.unsqueeze(-1))
    assert metrics["avg_soft_gate"] == pytest.approx(gate[live].mean().item(), rel=1e-13)


@pytest.mark.parametrize("mask_type", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("shape", ["(B,)", "(B, 1)", "(B, T)"])
def test_masks_and_advantages_of_every_form_give_the_same(mask_type: torch.dtype, shape: str) -> None:
    logp, old, mask, advantages = example()
    expected = SAPOPolicyLossFn()(logp, old, mask, advantages)
    column = advantages.unsqueeze(-1)
    forms = {"(B,)": advantages, "(B, 1)": column, "(B, T)": column.expand(logp.shape)}
    loss, metrics = SAPOPolicyLossFn()(logp, old, mask.to(mask_type), forms[shape])
    assert torch.equal(loss, expected[0]) and metrics == expected[1]


def test_half_precision_is_computed_in_float32() -> None:
    logp, old, mask, advantages = (tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in example())
    logp.requires_grad_()
    loss, _ = SAPOPolicyLossFn(gradient="paper")(logp, old, mask, advantages)
    loss.backward()
    same = SAPOPolicyLossFn(gradient="paper")(logp.detach().float(), old.float(), mask, advantages.float())[0]
    assert loss.dtype == torch.float32 and torch.equal(loss, same)
    assert logp.grad.dtype == torch.bfloat16


def test_old_logprob_receives_no_gradient() -> None:
    logp, old, mask, advantages = example()
    logp.requires_grad_()
    old.requires_grad_()
    SAPOPolicyLossFn(gradient="paper")(logp, old, mask, advantages)[0].backward()
    assert old.grad is None and logp.grad is not None


@pytest.mark.parametrize("name", sorted(POLICY_LOSS_FN))
def test_a_batch_without_tokens_gives_zero_and_a_zero_gradient(name: str) -> None:
    logp, old, mask, advantages = example()
    logp.requires_grad_()
    loss, metrics = POLICY_LOSS_FN.get(name)()(logp, old, torch.zeros_like(mask), advantages)
    loss.backward()
    assert loss.item() == 0 and (logp.grad == 0).all()
    assert set(metrics.values()) == {0.0}


def test_every_row_counts_in_a_mean_over_sequences() -> None:
    values = torch.tensor([[1.0, 3.0], [5.0, 7.0], [9.0, 9.0]])
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]])
    expected = {
        "token-mean": 9 / 3,
        "seq-mean-token-mean": (2 + 5 + 0) / 3,
        "seq-mean-token-sum": (4 + 5 + 0) / 3,
        "seq-mean-token-sum-norm": 9 / 2,
    }
    found = {mode: aggregate_loss(values, mask, mode).item() for mode in expected}
    assert found == pytest.approx(expected)
    assert aggregate_loss(values, mask, "seq-mean-token-sum-norm", normalizer=6).item() == pytest.approx(9 / 6)


def test_masked_mean_leaves_out_what_is_masked() -> None:
    values = torch.tensor([[1.0, float("nan")], [3.0, 5.0], [float("inf"), float("nan")]])
    mask = torch.tensor([[1, 0], [1, 1], [0, 0]])
    assert masked_mean(values, mask).item() == 3.0
    assert masked_mean(values, mask.float(), axis=-1).tolist() == [1.0, 4.0, 0.0]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("sapo", {"tau_pos": 0.0}, "tau_pos must be above 0"),
        ("sapo", {"tau_neg": -1.0, "strict_temperatures": False}, "tau_neg must be above 0"),
        ("sapo", {"tau_pos": float("nan")}, "tau_pos must be above 0"),
        ("sapo", {"tau_neg": 0.95}, "strict_temperatures"),
        ("sapo", {"gradient": "seed"}, "paper, detached"),
        ("sapo", {"sides": "left", "gradient": "paper"}, "both, one"),
        ("sapo", {"sides": "one", "gradient": "detached"}, "needs gradient 'paper'"),
        ("sapo", {"gate": "step"}, "sigmoid, erf, arctan, softsign"),
        ("sapo", {"loss_agg_mode": "mean"}, "token-mean"),
        ("sapo", {"ratio_level": "word"}, "token, sequence"),
        ("sapo", {"log_ratio_clamp": 0.0}, "log_ratio_clamp"),
        ("sapo", {"log_ratio_clamp": 100.0}, "log_ratio_clamp"),
        ("sapo", {"loss_agg_norm": 0.0}, "loss_agg_norm"),
        ("grpo", {"clip_low": -0.1}, "clip_low"),
        ("grpo", {"dual_clip": 1.0}, "dual_clip"),
        ("cispo", {"clip_high": -0.1}, "clip_high"),
        ("dppo", {"clip_low": -0.1}, "clip_low"),
        ("vespo", {"lambda_neg": 0.0}, "lambda_neg"),
        ("m2po", {"m2_threshold": 0.0}, "m2_threshold"),
        ("cppo", {"clip_high": -0.1}, "clip_high"),
        ("cppo", {"prefix_budget": -0.1}, "prefix_budget"),
        ("cppo", {"weight_floor": 1.5}, "weight_floor"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        POLICY_LOSS_FN.get(name)(**settings)
    with pytest.raises(ValueError, match=words):
        build_loss(name, **settings)


def test_the_papers_ablation_runs_when_asked_for() -> None:
    assert SAPOPolicyLossFn(tau_neg=0.95, strict_temperatures=False).tau_neg == 0.95


def test_a_loss_of_ones_own_is_built_by_its_name() -> None:
    @POLICY_LOSS_FN.register_module("twice")
    class Twice(PolicyLossFn):
        """Twice the policy gradient."""

        def token_losses(self, logps: Tensor, log_ratios: Tensor, advantages: Tensor) -> TokenLosses:
            return TokenLosses(-2 * advantages * logps, 2 / log_ratios.detach().exp())

    logp, old, mask, advantages = example()
    loss, metrics = POLICY_LOSS_FN.get("twice")()(logp, old, mask, advantages)
    assert loss.item() == pytest.approx(2 * POLICY_LOSS_FN.get("reinforce")()(logp, old, mask, advantages)[0].item())
    assert metrics["policy_loss"] == loss.item()
    assert callable(build_loss("twice"))


OWN = """
from dataclasses import dataclass
from sapo_rl.losses import PolicyLossFn, TokenLosses

@dataclass
class Scaled(PolicyLossFn):
    tau_pos: float = 1.0
    scale: float = 3.0
    def token_losses(self, logps, log_ratios, advantages):
        return TokenLosses(logps * 0 + self.scale * self.tau_pos, logps.detach() * 0)

class Fussy(Scaled):
    def __post_init__(self):
        raise ValueError("tau_pos must be even")

class Unfinished(PolicyLossFn): ...

def function(logps): ...
"""


def test_a_loss_of_ones_own_is_found_by_its_dotted_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the config's values for the settings that it has, and keeps its defaults for others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_losses.py").write_text(OWN)
    two = torch.zeros(2)
    loss = objective(LossConfig(name="own_losses.Scaled", tau_pos=2.0))
    inputs = LossInputs(
        logps=two,
        old_logps=two,
        advantages=two,
        sequence_ids=torch.zeros(2, dtype=torch.int64),
        num_sequences=1,
        token_weights=torch.full((2,), 0.5),
    )
    assert loss(inputs).loss.item() == 6.0
    for key, name, words in [
        ("args", "Fussy", "refuses its settings: tau_pos must be even"),
        ("name", "Unfinished", "is no subclass of PolicyLossFn that has token_losses"),
        ("name", "function", "is no subclass of PolicyLossFn"),
        ("name", "Scald", "did you mean 'Scaled'"),
    ]:
        with pytest.raises(UserError, match=rf"^loss\.{key}: .*own_losses\.{name}'.*{words}"):
            objective(LossConfig(name=f"own_losses.{name}"))


@pytest.mark.parametrize("text", ["import sys; sys.exit(3)", "1 / 0", "import absent_package", "x = ("])
def test_a_module_of_losses_that_does_not_import_is_told_with_its_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    name = f"bad_losses_{len(text)}"
    (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(UserError, match=rf"loss\.name: .*importing '{name}' failed: .*{name}\.py:1"):
        objective(LossConfig(name=f"{name}.Loss"))
