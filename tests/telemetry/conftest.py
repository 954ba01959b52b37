"""Groups of samples and a config, as the telemetry is given them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from samples import one_row

from sapo_rl.config import Config, RewardFunctionConfig
from sapo_rl.telemetry import Row, rows
from sapo_rl.types import Group, Prompt, Stop

MakeGroup = Callable[..., list[Row]]


@pytest.fixture
def make_group() -> MakeGroup:
    """`make_group(index, rewards)`: the rows of a group whose sample i has i + 1 tokens; the last one is cut."""

    def make(index: int, rewards: list[float | None], name: str = "match", step: int = 1) -> list[Row]:
        samples = [
            one_row(
                [7] * (place + 1),
                stop=Stop.LENGTH if place == len(rewards) - 1 else Stop.STOP,
                version=step - 1,
                text=f"reply {place}\x1b[31m",
                rewards={name: reward},
                reward=reward,
                advantage=0.5 * place,
            )
            for place, reward in enumerate(rewards)
        ]
        prompt = Prompt(index, [1, 2], f"What is {index} - 8? [bold]", {"answer": str(index - 8)})
        return rows(step, Group(prompt, samples))

    return make


@pytest.fixture
def config() -> Config:
    """A run of four steps with one reward function, silent and without W&B."""
    config = Config()
    config.model.path = "/models/tiny"
    config.trainer.steps = 4
    config.logging.console = "none"
    config.logging.wandb = "off"
    config.reward.functions = {"match": RewardFunctionConfig(function="exact_match")}
    return config
