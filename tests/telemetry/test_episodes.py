"""The numbers of episodes with several turns."""

from __future__ import annotations

from typing import Any

import pytest

from sapo_rl.config import Config, EnvironmentConfig, RewardFunctionConfig
from sapo_rl.telemetry import Timers, steps
from sapo_rl.telemetry.episodes import EpisodeFacts, episode_metrics, facts_of
from sapo_rl.telemetry.progress import phases
from sapo_rl.telemetry.sinks.completions import rows
from sapo_rl.telemetry.steps import RankReport
from sapo_rl.types import Batch, Group, Prompt, RewardStats, Row, Sample, Stop, Turn, Usage


def samples(first: str = "", second: str = "") -> list[Sample]:
    """An episode of three turns in two rows, and one of a single turn; the names are their environments'."""
    info: list[dict[str, Any]] = [
        {"environment": first, "tool_calls": 3, "tool_failures": 1, "seconds": 0.5, "sent": 30, "cached": 16},
        {"environment": second, "tool_calls": 0, "tool_failures": 0, "seconds": 1.5, "sent": 10, "cached": 0},
    ]
    forked = [Row([1], [2, 3, 4, 5], [(0, 1), (3, 4)]), Row([1, 9], [6, 7], [(0, 2)])]
    turns = [Turn(0, 1), Turn(3, 4), Turn(0, 2, 1)]
    return [
        Sample(forked, Stop.TURNS, (0, 0), turns, info=info[0], reward=0.25),
        Sample([Row([1], [2, 3])], Stop.STOP, (0, 0), [Turn(0, 2)], info=info[1], reward=1.0),
    ]


def metrics_of(found: list[Sample], dropped: int = 0) -> dict[str, float]:
    return episode_metrics(
        rows(1, Group(Prompt(0, [1], "a", {}), found)), [facts_of(one) for one in found], dropped=dropped
    )


def test_facts_and_metrics_count_turns_tokens_tools_and_why_episodes_ended() -> None:
    assert facts_of(samples()[0]) == EpisodeFacts("", 3, 1, 0.5, 30, 16)
    assert metrics_of(samples(), dropped=2) == {
        "episode/turns/mean": 2.0,
        "episode/turns/max": 3.0,
        "episode/masked_fraction": 0.25,
        "episode/forks": 1.0,
        "episode/dropped": 2.0,
        "tools/call_frequency": 1.5,
        "tools/failure_frequency": 1 / 3,
        "time/environment": 1.0,
        "rollout/prefix_hit": 0.4,
        "stop/stop": 0.5,
        "stop/length": 0.0,
        "stop/turns": 0.5,
        "stop/environment": 0.0,
    }


def test_several_environments_have_numbers_of_their_own() -> None:
    own = {name: value for name, value in metrics_of(samples("a", "b")).items() if name.startswith("environment/")}
    assert own == {
        "environment/a/fraction": 0.5,
        "environment/a/turns": 3.0,
        "environment/a/reward": 0.25,
        "environment/b/fraction": 0.5,
        "environment/b/turns": 1.0,
        "environment/b/reward": 1.0,
    }


def test_the_wait_for_an_environment_is_no_phase_of_its_own() -> None:
    record = {"step": 1, "time/step": 5.0, "time/rollout": 3.0, "time/update": 2.0, "time/environment": 1.5}
    assert phases(record) == {"rollout": 3.0, "update": 2.0}


def test_what_another_rank_has_dropped_and_could_not_score_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = Config(environment=EnvironmentConfig("guess"))
    cfg.reward.functions["judge"] = RewardFunctionConfig("my.judge", on_error="none")
    told: list[str] = []
    logged: dict[str, float] = {}

    class Recorder:
        def warn(self, text: str) -> None:
            told.append(text)

        def log_step(self, step: int, metrics: dict[str, float], groups: Any, tokens: Any) -> None:
            logged.update(metrics)

    def with_another_rank(own: list[RankReport]) -> list[RankReport]:
        lost = ["environment 'guess' failed on prompt 3: no mood", "environment 'guess' failed on prompt 4: the same"]
        failed = RewardStats({"judge": 3}, {"judge": 0}, {"judge": "reward function 'judge' failed"})
        return [*own, own[0]._replace(dropped=lost, scoring=failed)]

    monkeypatch.setattr(steps, "gather_object", with_another_rank)
    monkeypatch.setattr(Timers, "take", lambda self: {"time/step": 1.0})
    batch = Batch(
        [Group(Prompt(0, [1], "a", {}), samples())], RewardStats({"judge": 1}, {"judge": 0}, {}), {}, Usage([1.0], 1.0)
    )
    recorder: Any = Recorder()
    steps.StepLog(recorder, Timers(None), cfg).log(1, batch, {}, restarts=0, peak=0.0)
    assert told == [
        "environment 'guess' failed on prompt 3: no mood (2 episodes of step 1 dropped)",
        "reward function 'judge' failed (reward judge: 4 samples left their groups)",
        "reward judge applied to no completion of step 1: it returned None for all",
    ]
    assert logged["rewards/judge/errors"] == 4
    assert logged["episode/dropped"] == 2 and logged["episode/turns/mean"] == 2
