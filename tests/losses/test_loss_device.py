"""On a GPU: a micro-batch never waits for the device, and the numbers are those of the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from losses.batches import ALONE, SETTINGS, Batch, inputs_of, limit_of, make_batch

from sapo_rl.losses import LossInputs, LossOutputs, build_loss, policy_metrics

CORRECTION = {"mode": "token_mask", "low": 0.5, "high": 2.0, "stale_negative_kl": 0.2}


def moved(inputs: LossInputs, device: str) -> LossInputs:
    tensors = {name: value for name, value in vars(inputs).items() if isinstance(value, torch.Tensor)}
    return replace(inputs, **{name: value.to(device) for name, value in tensors.items()})


def step(inputs: LossInputs, settings: dict[str, Any]) -> tuple[LossOutputs, torch.Tensor, dict[str, torch.Tensor]]:
    loss_fn = build_loss(**settings, kl={"coef": 0.1, "kind": "k3"}, correction=CORRECTION)
    inputs = replace(inputs, logps=inputs.logps.detach().requires_grad_())
    outputs = loss_fn(inputs)
    (gradient,) = torch.autograd.grad(outputs.loss, inputs.logps)
    metrics = policy_metrics(
        logps=inputs.logps,
        old_logps=inputs.old_logps,
        advantages=inputs.advantages,
        sequence_ids=inputs.sequence_ids,
        num_sequences=inputs.num_sequences,
        gradient_weight=outputs.gradient_weight,
        tau_pos=1.0,
        tau_neg=1.05,
        rollout_logps=inputs.rollout_logps,
    )
    return outputs, gradient, metrics


@pytest.mark.gpu
@pytest.mark.parametrize("name", SETTINGS)
def test_a_micro_batch_does_not_wait_for_the_device(name: str) -> None:
    batch: Batch = make_batch([300, 1, 70, 500], seed=2)
    settings = {"name": name} | SETTINGS[name]
    rows = [0, 1, 2, 3]
    limit = limit_of(build_loss(**settings), batch, rows, ALONE)
    inputs = replace(inputs_of(batch, batch.logps, rows, "token-mean"), limit=limit)
    on_device = moved(inputs, "cuda")
    step(on_device, settings)  # first calls may wait while they load kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs, gradient, metrics = step(on_device, settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, expected_gradient, expected_metrics = step(inputs, settings)
    torch.testing.assert_close(outputs.loss.cpu(), expected.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=1e-10, atol=1e-12)
    for key, value in expected_metrics.items():
        torch.testing.assert_close(metrics[key].cpu(), value, rtol=1e-10, atol=1e-12)
