"""What is told of SAPO's temperatures before a run."""

from __future__ import annotations

import pytest

from sapo_rl.config import Config, ModelConfig, RolloutConfig, TrainerConfig
from sapo_rl.config.loss import LossConfig
from sapo_rl.config.refill import ReplayConfig
from sapo_rl.policy.temperatures import temperature_warning

OVERLAP, REPLAY = RolloutConfig(mode="overlap"), RolloutConfig(replay=ReplayConfig(size=8))


@pytest.mark.parametrize(
    ("updates", "loss", "rollout", "word"),
    [
        (1, LossConfig(), RolloutConfig(), "inert"),
        (1, LossConfig(), OVERLAP, "inert"),  # the ratio is taken against what the trainer says just before
        (1, LossConfig(old_logps="rollout"), RolloutConfig(), "inert"),
        (1, LossConfig(old_logps="rollout"), OVERLAP, None),
        (1, LossConfig(old_logps="rollout"), REPLAY, None),
        (1, LossConfig(tau_target_kl=0.01), RolloutConfig(), "inert"),
        (16, LossConfig(tau_target_kl=0.01), RolloutConfig(), None),
        (16, LossConfig(), RolloutConfig(), "16 updates"),
        (16, LossConfig(gradient="detached"), RolloutConfig(), None),
        (1, LossConfig(name="grpo"), RolloutConfig(), None),
    ],
)
def test_a_gate_that_cannot_do_its_work_is_told(
    updates: int, loss: LossConfig, rollout: RolloutConfig, word: str | None
) -> None:
    config = Config(
        model=ModelConfig(path="m"), loss=loss, rollout=rollout, trainer=TrainerConfig(updates_per_rollout=updates)
    )
    told = temperature_warning(config)
    assert told is None if word is None else told is not None and word in told
