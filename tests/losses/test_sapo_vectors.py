"""SAPO against independently computed numbers (50-digit decimal arithmetic), in float64 and float32."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sapo_rl.losses import (
    LossInputs,
    SAPOPolicyLossFn,
    build_loss,
    gate_value,
    gate_weight,
    policy_metrics,
    token_weights,
)

DATA = json.loads((Path(__file__).parent / "sapo_vectors.json").read_text())
TABLES = {"paper": "paper", "detached": "seed"}
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}
vectors = pytest.mark.parametrize("vector", DATA["vectors"], ids=lambda vector: vector["id"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
gradients = pytest.mark.parametrize("gradient", TABLES)


def close(found: Tensor | float, expected: float | list[Any], dtype: torch.dtype) -> None:
    tolerance = DTYPES[dtype]
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=tolerance,
        atol=1e-12 if dtype == torch.float64 else 1e-9,
    )


def settings_of(vector: dict[str, Any]) -> dict[str, Any]:
    return {
        "tau_pos": vector["tau_pos"],
        "tau_neg": vector["tau_neg"],
        "log_ratio_clamp": vector["log_ratio_clamp"] or 20.0,
        "strict_temperatures": False,
    }


@vectors
@dtypes
@gradients
def test_vector_through_the_class(vector: dict[str, Any], dtype: torch.dtype, gradient: str) -> None:
    expected = vector[TABLES[gradient]]
    logp = torch.tensor([[vector["logp"]]], dtype=dtype, requires_grad=True)
    old, advantage = torch.tensor([[vector["old_logp"]]], dtype=dtype), torch.tensor([vector["advantage"]], dtype=dtype)
    loss, metrics = SAPOPolicyLossFn(gradient=gradient, **settings_of(vector))(
        logp, old, torch.ones(1, 1, dtype=torch.bool), advantage
    )
    loss.backward()
    assert loss.dtype == dtype
    close(loss.detach(), expected["loss"], dtype)
    close(logp.grad.squeeze(), expected["dloss_dlogp"], dtype)
    close(metrics["sapo_loss"], expected["loss"], dtype)
    close(metrics["avg_soft_gate"], vector["gate_f"], dtype)


@vectors
@dtypes
@gradients
def test_vector_through_the_packed_function(vector: dict[str, Any], dtype: torch.dtype, gradient: str) -> None:
    expected = vector[TABLES[gradient]]
    logp = torch.tensor([vector["logp"]], dtype=dtype, requires_grad=True)
    outputs = build_loss("sapo", gradient=gradient, **settings_of(vector))(
        LossInputs(
            logps=logp,
            old_logps=torch.tensor([vector["old_logp"]], dtype=dtype),
            advantages=torch.tensor([vector["advantage"]], dtype=dtype),
            sequence_ids=torch.tensor([0]),
            num_sequences=1,
            token_weights=torch.ones(1),
        )
    )
    outputs.loss.backward()
    close(outputs.loss.detach(), expected["loss"], dtype)
    close(logp.grad.squeeze(), expected["dloss_dlogp"], dtype)


@vectors
@dtypes
def test_gate_and_weight(vector: dict[str, Any], dtype: torch.dtype) -> None:
    ratio, tau = torch.tensor(float(vector["ratio"]), dtype=dtype), torch.tensor(vector["tau"], dtype=dtype)
    close(gate_value(ratio, tau), vector["gate_f"], dtype)
    close(gate_weight(ratio, tau), vector["weight_w"], dtype)


def batch_tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = DATA["batch"]
    logp, old, advantage = (torch.tensor(batch[key], dtype=dtype) for key in ("logp", "old_logp", "advantage"))
    return logp.requires_grad_(), old, torch.tensor(batch["mask"]), advantage


@dtypes
@gradients
@pytest.mark.parametrize("case", ["token-mean", "seq-mean-token-mean/all-rows", "seq-mean-token-sum/all-rows"])
def test_ragged_batch_through_the_class(dtype: torch.dtype, gradient: str, case: str) -> None:
    expected = DATA["batch"][TABLES[gradient]][case]
    logp, old, mask, advantage = batch_tensors(dtype)
    loss, _ = SAPOPolicyLossFn(gradient=gradient, loss_agg_mode=case.split("/")[0])(logp, old, mask, advantage)
    loss.backward()
    close(loss.detach(), expected["loss"], dtype)
    close(logp.grad, expected["grad"], dtype)


@gradients
@pytest.mark.parametrize("normalizer", [None, 7.0])
def test_ragged_batch_summed_over_a_fixed_norm(gradient: str, normalizer: float | None) -> None:
    expected = DATA["batch"][TABLES[gradient]]["seq-mean-token-sum/all-rows"]
    logp, old, mask, advantage = batch_tensors(torch.float64)
    sapo = SAPOPolicyLossFn(gradient=gradient, loss_agg_mode="seq-mean-token-sum-norm", loss_agg_norm=normalizer)
    loss, _ = sapo(logp, old, mask, advantage)
    loss.backward()
    rows, width = mask.shape
    factor = rows / (normalizer or width)
    close(loss.detach(), expected["loss"] * factor, torch.float64)
    close(logp.grad, (torch.tensor(expected["grad"], dtype=torch.float64) * factor).tolist(), torch.float64)


@dtypes
@gradients
@pytest.mark.parametrize("case", list(DATA["batch"]["paper"]))
def test_ragged_batch_through_the_packed_function(dtype: torch.dtype, gradient: str, case: str) -> None:
    expected = DATA["batch"][TABLES[gradient]][case]
    logp, old, mask, advantage = batch_tensors(dtype)
    live, lengths = mask.bool(), mask.sum(-1)
    mode, _, rows = case.partition("/")
    num_sequences = int((lengths > 0).sum()) if rows == "live-rows" else len(lengths)
    weights = token_weights(lengths, mode, num_sequences=num_sequences, num_tokens=int(lengths.sum()))
    ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    outputs = build_loss("sapo", gradient=gradient)(
        LossInputs(
            logps=logp[live],
            old_logps=old[live],
            advantages=advantage[live],
            sequence_ids=ids,
            num_sequences=len(lengths),
            token_weights=weights[ids],
        )
    )
    outputs.loss.backward()
    close(outputs.loss.detach(), expected["loss"], dtype)
    close(logp.grad, expected["grad"], dtype)


@pytest.mark.parametrize("case", DATA["sequence_gate_reduction"])
def test_sequence_gate_reduction(case: dict[str, Any]) -> None:
    log_ratios = torch.tensor(case["log_ratios"], dtype=torch.float64)
    tau, log_s = torch.tensor(case["tau"], dtype=torch.float64), torch.tensor(case["log_s"], dtype=torch.float64)
    linearised = gate_weight(1 + log_ratios, tau).mean()
    sequence = gate_weight(1 + log_s, tau)
    close(linearised, case["mean_token_gate_linearised"], torch.float64)
    close(gate_weight(log_ratios.exp(), tau).mean(), case["mean_token_gate_exact"], torch.float64)
    close(sequence, case["seq_gate"], torch.float64)
    metrics = policy_metrics(
        logps=log_ratios - 1,
        old_logps=torch.full_like(log_ratios, -1),
        advantages=torch.ones_like(log_ratios),
        sequence_ids=torch.zeros(len(log_ratios), dtype=torch.long),
        num_sequences=1,
        gradient_weight=torch.ones_like(log_ratios),
        tau_pos=case["tau"],
        tau_neg=9.0,
    )
    close(metrics["policy/log_ratio_var_mean"], case["var"], torch.float64)
    close(metrics["policy/sequence_gate_bound"], case["bound"], torch.float64)
    assert (linearised - sequence).abs() <= metrics["policy/sequence_gate_bound"] + 1e-15


@gradients
@dtypes
def test_overflowing_ratio_keeps_a_finite_gradient(gradient: str, dtype: torch.dtype) -> None:
    values = {"dtype": dtype, "requires_grad": True}
    naive = torch.tensor([-1.0], **values)
    ratio = (naive + 800).exp()
    (torch.sigmoid(1.05 * (ratio - 1)) * 4 / 1.05).sum().backward()
    assert naive.grad.isnan().all()

    logp = torch.tensor([[-1.0, -1.0]], **values)
    old = torch.tensor([[-801.0, -1.0]], dtype=dtype)
    loss, metrics = SAPOPolicyLossFn(gradient=gradient)(logp, old, torch.ones(1, 2), -torch.ones(1, dtype=dtype))
    loss.backward()
    assert logp.grad.isfinite().all() and loss.isfinite() and all(map(math.isfinite, metrics.values()))
    assert logp.grad[0, 1] != 0


@gradients
@pytest.mark.parametrize("poison", [float("inf"), -float("inf"), float("nan")])
def test_masked_positions_reach_neither_loss_nor_gradient(gradient: str, poison: float) -> None:
    clean = batch_tensors(torch.float64)
    dirty = batch_tensors(torch.float64)
    live = dirty[2].bool()
    with torch.no_grad():
        for tensor in (dirty[0], dirty[1], dirty[3]):
            tensor[~live] = poison
    results = []
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"):
        for logp, old, mask, advantage in (clean, dirty):
            logp.grad = None
            loss, metrics = SAPOPolicyLossFn(gradient=gradient, loss_agg_mode=mode)(logp, old, mask, advantage)
            loss.backward()
            results.append((loss.detach(), logp.grad, metrics))
        (loss, gradient_clean, metrics), (dirty_loss, gradient_dirty, dirty_metrics) = results[-2:]
        assert torch.equal(loss, dirty_loss) and metrics == dirty_metrics
        assert torch.equal(gradient_clean, gradient_dirty)
        assert (gradient_dirty[~live] == 0).all() and (gradient_dirty[live] != 0).all()
