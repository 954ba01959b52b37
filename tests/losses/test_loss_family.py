"""The other losses, the KL penalty and the mismatch correction, against their textbook formulas."""

from __future__ import annotations

import inspect
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch
from losses.batches import inputs_of, make_batch
from torch import Tensor

from sapo_rl.config.loss import CHOSEN_KEYS, LossConfig, unread
from sapo_rl.losses import (
    POLICY_LOSS_FN,
    LossInputs,
    LossOutputs,
    build_loss,
    kl_estimate,
    mismatch_factor,
    stale_negative_mask,
    token_weights,
)

BATCH = make_batch([4, 1, 5, 3], seed=3)


def run(name: str, **settings: Any) -> tuple[LossInputs, LossOutputs, Tensor]:
    """Inputs, outputs and gradient of the plain sum over the whole batch."""
    inputs = inputs_of(BATCH, BATCH.logps.clone().requires_grad_(), [0, 1, 2, 3], "seq-mean-token-sum")
    inputs = replace(inputs, token_weights=torch.ones_like(inputs.old_logps))
    outputs = build_loss(name, **settings)(inputs)
    return inputs, outputs, torch.autograd.grad(outputs.loss, inputs.logps)[0]


def ratio_of(inputs: LossInputs) -> Tensor:
    return (inputs.logps.detach() - inputs.old_logps).exp()


def test_grpo_is_ppos_pessimistic_minimum() -> None:
    inputs, outputs, _ = run("grpo", clip_low=0.1, clip_high=0.3)
    ratio, advantage = ratio_of(inputs), inputs.advantages
    expected = -torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.3) * advantage).sum()
    torch.testing.assert_close(outputs.loss.detach(), expected)
    assert set(outputs.gradient_weight.tolist()) == {0.0, 1.0}


def test_dual_clip_bounds_the_loss_of_negative_advantages_only() -> None:
    inputs, outputs, gradient = run("grpo", dual_clip=1.25)
    ratio, advantage = ratio_of(inputs), inputs.advantages
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    dual = torch.where(advantage < 0, torch.maximum(clipped, 1.25 * advantage), clipped)
    torch.testing.assert_close(outputs.loss.detach(), -dual.sum())
    beyond = (advantage < 0) & (ratio > 1.25)
    assert beyond.any() and (gradient[beyond] == 0).all()


def test_gspo_clips_whole_sequences() -> None:
    _, outputs, _ = run("gspo", clip_low=0.05, clip_high=0.05, ratio_level="token")
    by_sequence = outputs.gradient_weight.split([4, 1, 5, 3])
    assert all(len(set(part.tolist())) == 1 for part in by_sequence)
    expected = []
    for part in range(4):
        log_s = (BATCH.logps - BATCH.old_logps).split([4, 1, 5, 3])[part].mean()
        advantage = BATCH.advantages.split([4, 1, 5, 3])[part]
        expected.append(-torch.minimum(log_s.exp() * advantage, log_s.exp().clamp(0.95, 1.05) * advantage))
    torch.testing.assert_close(outputs.loss.detach(), torch.cat(expected).sum())


def test_cispo_keeps_every_tokens_gradient_at_a_clipped_size() -> None:
    inputs, _, gradient = run("cispo", clip_low=0.1, clip_high=0.2)
    torch.testing.assert_close(gradient, -inputs.advantages * ratio_of(inputs).clamp(0.9, 1.2))


def test_reinforce_ignores_the_ratio() -> None:
    inputs, outputs, gradient = run("reinforce")
    torch.testing.assert_close(gradient, -inputs.advantages)
    torch.testing.assert_close(outputs.loss.detach(), -(inputs.advantages * inputs.logps.detach()).sum())


def test_sapo_fades_where_grpo_clips_and_also_on_the_other_side() -> None:
    inputs, soft, _ = run("sapo", gradient="paper", tau_pos=1.763 / 0.2, tau_neg=1.763 / 0.2)
    far = (ratio_of(inputs) - 1).abs() > 0.2
    assert far.any() and (soft.gradient_weight[far] < 0.5).all() and (soft.gradient_weight[~far] > 0.5).all()


def objective(config: LossConfig) -> dict[str, object]:
    """The settings that are the loss's own; old log-probabilities and temperatures are the trainer's affair."""
    return {key: value for key, value in asdict(config).items() if key not in ("old_logps", "tau_target_kl")}


@pytest.mark.parametrize("name", sorted(POLICY_LOSS_FN))
def test_the_configs_loss_group_is_accepted_by_every_loss(name: str) -> None:
    config = objective(LossConfig())
    inputs = inputs_of(BATCH, BATCH.logps, [0, 1, 2, 3], config["loss_agg_mode"])
    assert build_loss(**(config | {"name": name}))(inputs).loss.isfinite()


@pytest.mark.parametrize("name", sorted(POLICY_LOSS_FN))
def test_the_keys_that_a_loss_is_said_to_read_are_its_fields(name: str) -> None:
    read = {"tau_target_kl"} if name == "sapo" else set[str]()  # the trainer reads it, for this loss alone
    read |= set(inspect.signature(POLICY_LOSS_FN.get(name)).parameters) & {key.name for key in fields(LossConfig)}
    assert unread(name).keys() == {"args", *CHOSEN_KEYS} - read
    assert read - set(CHOSEN_KEYS) == {"log_ratio_clamp", "loss_agg_mode", "loss_agg_norm"}


def test_the_configs_defaults_are_the_papers_objective() -> None:
    outputs = build_loss(**objective(LossConfig()))(inputs_of(BATCH, BATCH.logps, [0, 1, 2, 3], "seq-mean-token-mean"))
    advantage = BATCH.advantages
    tau = torch.where(advantage > 0, torch.tensor(1.0).double(), torch.tensor(1.05, dtype=torch.float64))
    gate = 4 / tau * torch.sigmoid(tau * ((BATCH.logps - BATCH.old_logps).exp() - 1))
    rows = (gate * advantage).split([4, 1, 5, 3])
    torch.testing.assert_close(outputs.loss, -torch.stack([row.mean() for row in rows]).mean())
    assert outputs.kl is not None and outputs.correction is None


def test_args_are_fields_of_a_class_and_nothing_of_a_name() -> None:
    inputs = inputs_of(BATCH, BATCH.logps, [0, 1, 2, 3], "token-mean")
    cispo = POLICY_LOSS_FN.get("cispo")
    expected = build_loss("cispo", clip_low=0.01)(inputs).loss
    assert build_loss(cispo, clip_low=0.9, args={"clip_low": 0.01})(inputs).loss == expected
    for name, problem in (("cispo", "'cispo' takes no args"), (cispo, "unknown argument 'tau_pos'")):
        with pytest.raises(ValueError, match=problem):
            build_loss(name, args={"tau_pos": 1.0})


def test_an_unknown_setting_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="tau_negg"):
        build_loss("sapo", tau_negg=1.0)
    with pytest.raises(KeyError, match="sapo"):
        build_loss("sapoo")


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_penalty_is_added_after_the_correction(kind: str) -> None:
    correction = {"mode": "token_truncate", "high": 1.1}
    inputs, plain, plain_gradient = run("sapo", gradient="paper", correction=correction)
    _, penalised, gradient = run("sapo", gradient="paper", correction=correction, kl={"coef": 0.3, "kind": kind})
    logps = inputs.logps.detach().requires_grad_()
    d = inputs.ref_logps - logps
    estimate = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}[kind]
    torch.testing.assert_close(penalised.kl, estimate.detach())
    torch.testing.assert_close(penalised.loss - plain.loss, 0.3 * estimate.sum())
    torch.testing.assert_close(gradient - plain_gradient, torch.autograd.grad(0.3 * estimate.sum(), logps)[0])


def test_kl_estimators_average_to_the_divergence() -> None:
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.randn(6, generator=draw, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    exact = (p.exp() * (p - q)).sum()
    assert (p.exp() * kl_estimate(p, q, "k1")).sum().item() == pytest.approx(exact.item(), rel=1e-12)
    assert (p.exp() * kl_estimate(p, q, "k3")).sum().item() == pytest.approx(exact.item(), rel=1e-12)
    assert (kl_estimate(p, q, "k2") >= 0).all() and (kl_estimate(p, q, "k3") >= 0).all()
    assert kl_estimate(torch.tensor(-500.0), torch.tensor(0.0), "k3").isfinite()


def test_a_penalty_without_reference_and_a_correction_without_rollout_are_refused() -> None:
    inputs = replace(inputs_of(BATCH, BATCH.logps, [0], "token-mean"), ref_logps=None, rollout_logps=None)
    with pytest.raises(ValueError, match="ref_logps"):
        build_loss("sapo", kl={"coef": 0.1})(inputs)
    with pytest.raises(ValueError, match="rollout_logps"):
        build_loss("sapo", correction={"mode": "token_mask"})(inputs)
    assert build_loss("sapo")(inputs).kl is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kl": {"coef": -0.1}}, "kl.coef"),
        ({"kl": {"kind": "k4"}}, "k1, k2, k3"),
        ({"correction": {"mode": "mask"}}, "token_truncate"),
        ({"correction": {"low": 2.0, "high": 1.0}}, "low"),
    ],
)
def test_nested_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_loss("sapo", **settings)


def mismatch_example() -> tuple[Tensor, Tensor, Tensor]:
    rho = torch.tensor([1.0, 3.0, 0.4, 1.5, 1.2, 0.5], dtype=torch.float64)
    old = torch.full_like(rho, -2.0)
    return old, old - rho.log(), torch.tensor([0, 0, 0, 1, 1, 2])


def test_mismatch_factors() -> None:
    old, rollout, ids = mismatch_example()
    settings = {"low": 0.5, "high": 2.0}

    def factors(mode: str, **changed: float) -> list[float]:
        return mismatch_factor(old, rollout, ids, 3, mode=mode, **(settings | changed)).tolist()

    assert factors("token_truncate") == pytest.approx([1.0, 2.0, 0.4, 1.5, 1.2, 0.5])
    assert factors("token_mask", low=0.45) == pytest.approx([1.0, 0.0, 0.0, 1.5, 1.2, 0.5])
    # geometric means of the three sequences: 1.063, 1.342, 0.5
    assert factors("sequence_mask", low=0.51, high=1.07) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert factors("sequence_mask", low=1.3, high=1.35) == [0.0, 0.0, 0.0, 1.0, 1.0, 0.0]


def test_stale_negative_sequences_are_dropped() -> None:
    old = torch.zeros(6)
    logps = torch.tensor([-0.1, -0.5, -0.3, -0.3, 0.4, -0.4])
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    mask = stale_negative_mask(logps, old, advantages, torch.tensor([0, 0, 1, 1, 2, 2]), 3, threshold=0.2)
    assert mask.tolist() == [0, 0, 1, 1, 1, 1]


def test_correction_multiplies_the_gradient_of_the_policy_term() -> None:
    correction = {"mode": "token_mask", "low": 0.9, "high": 1.2, "stale_negative_kl": 0.1}
    _, _, plain = run("sapo", gradient="paper")
    inputs, outputs, corrected = run("sapo", gradient="paper", correction=correction)
    torch.testing.assert_close(corrected, plain * outputs.correction)
    rho = (inputs.old_logps - inputs.rollout_logps).exp()
    kept = outputs.correction != 0
    assert 0 < kept.sum() < len(kept)
    torch.testing.assert_close(outputs.correction[kept], rho[kept])
    assert not outputs.correction.requires_grad


def test_token_weights_need_a_normaliser_only_where_it_is_read() -> None:
    lengths = torch.tensor([2, 0, 3])
    counts = {"num_sequences": 6, "num_tokens": 10}
    expected = {
        "token-mean": [0.1, 0.1, 0.1],
        "seq-mean-token-mean": [1 / 12, 1 / 6, 1 / 18],
        "seq-mean-token-sum": [1 / 6, 1 / 6, 1 / 6],
    }
    for mode, weights in expected.items():
        assert token_weights(lengths, mode, **counts).tolist() == pytest.approx(weights)
    with pytest.raises(ValueError, match="normalizer"):
        token_weights(lengths, "seq-mean-token-sum-norm", **counts)
    normed = token_weights(lengths, "seq-mean-token-sum-norm", normalizer=8, **counts)
    assert normed.tolist() == pytest.approx([1 / 48] * 3)
    with pytest.raises(ValueError, match="token-mean"):
        token_weights(lengths, "sum", **counts)
