"""What an evaluation says of the held-out prompts."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from sapo_rl.config import Config, EnvironmentConfig
from sapo_rl.evaluation import Evaluator
from sapo_rl.rollout.share import Share
from sapo_rl.types import Group, Prompt, Row, Sample, Stop


@pytest.mark.parametrize(("on_error", "told"), [("drop", {"eval/dropped": 2.0}), ("raise", {})])
def test_prompts_whose_episode_was_dropped_are_counted(on_error: str, told: dict[str, float]) -> None:
    prompts = [Prompt(number, [1], "Go.", {}) for number in range(5)]
    logged: list[dict[str, float]] = []
    kept: list[dict[str, Any]] = []

    def greedy(own: list[Prompt], on_group: Any) -> list[Group]:
        rewards: dict[str, float | None] = {"environment": 0.5}
        return [Group(one, [Sample([Row([1], [2])], Stop.STOP, (0, 0), text="a", rewards=rewards)]) for one in own[:3]]

    scoring = SimpleNamespace(add=None, result=lambda groups: SimpleNamespace(groups=groups))
    parts: Any = SimpleNamespace(
        greedy=greedy,
        scoring=lambda: nullcontext(scoring),
        log_eval=lambda step, metrics, examples, samples: (logged.append(metrics), kept.extend(samples)),
    )
    config = Config(environment=EnvironmentConfig("guess", on_error=on_error))
    timers: Any = lambda phase: nullcontext()  # noqa: E731
    Evaluator(prompts, Share(0, 1), parts, parts, parts, timers, config, []).run(0)
    assert logged == [{"eval/reward": 0.5, "eval/mean_length": 1.0} | told]
    assert [(row["prompt_index"], row["completion"], row["reward"]) for row in kept] == [
        (n, "a", 0.5) for n in range(3)
    ]
    assert {(row["step"], row["set"], row["greedy"]) for row in kept} == {(0, "default", True)}
