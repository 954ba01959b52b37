"""How far many updates on one batch carry the policy: clip < SAPO < SAPO with a detached gate.

A softmax bandit with 64 actions and 64 samples takes full-batch gradient steps of size 1. The detached form runs with
half its loss, since its gradient is 2 / tau times larger on-policy: at equal first steps it still drifts further.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

from sapo_rl.losses import LossInputs, build_loss

ACTIONS, SAMPLES, STEPS, RUNS = 64, 64, 16, 10


def drift(seed: int, name: str, loss_scale: float = 1.0, **settings: Any) -> float:
    """KL(old || new) after `STEPS` updates on one batch."""
    draw = torch.Generator().manual_seed(seed)
    old = torch.randn(ACTIONS, generator=draw, dtype=torch.float64).log_softmax(-1)
    actions = torch.multinomial(old.exp(), SAMPLES, replacement=True, generator=draw)
    rewards = torch.randn(ACTIONS, generator=draw, dtype=torch.float64)[actions]
    advantages = (rewards - rewards.mean()) / rewards.std()
    loss_fn = build_loss(name, **settings)
    logits = old.clone().requires_grad_()
    for _ in range(STEPS):
        outputs = loss_fn(
            LossInputs(
                logps=logits.log_softmax(-1)[actions],
                old_logps=old[actions],
                advantages=advantages,
                sequence_ids=torch.arange(SAMPLES),
                num_sequences=SAMPLES,
                token_weights=torch.full((SAMPLES,), loss_scale / SAMPLES, dtype=torch.float64),
            )
        )
        (gradient,) = torch.autograd.grad(outputs.loss, logits)
        logits.data -= gradient
    return (old.exp() * (old - logits.detach().log_softmax(-1))).sum().item()


def test_clip_drifts_less_than_sapo_and_sapo_less_than_its_detached_form() -> None:
    clip = fmean(drift(seed, "grpo") for seed in range(RUNS))
    paper = fmean(drift(seed, "sapo", gradient="paper") for seed in range(RUNS))
    detached = fmean(drift(seed, "sapo", gradient="detached", loss_scale=0.5) for seed in range(RUNS))
    assert 0 < clip < paper < detached
