"""A step's numbers, of all ranks together."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from accelerate.utils import gather_object

from sapo_rl.config import Config
from sapo_rl.telemetry import Telemetry
from sapo_rl.telemetry.episodes import EpisodeFacts, episode_metrics, facts_of
from sapo_rl.telemetry.metrics import sample_metrics
from sapo_rl.telemetry.sinks.completions import Row, rows
from sapo_rl.telemetry.sinks.tokens import Placed
from sapo_rl.telemetry.timers import Timers
from sapo_rl.types import Batch, RewardStats, TokenValues, Usage


class RankReport(NamedTuple):
    """One rank's share of a step's metrics, gathered on all ranks before logging."""

    groups: list[list[Row]]
    scoring: RewardStats
    usage: Usage
    restarts: int
    """Of its engines, so far."""
    peak: float
    """Its trainer's peak memory in GiB."""
    episodes: list[EpisodeFacts]
    """Where they may have several turns."""
    dropped: Sequence[str]
    """What failed in each episode that its environment has lost."""
    written: int
    """Groups, those included that others have replaced."""
    ages: dict[int, int]
    """Of the groups of earlier steps that were trained on, by the place of that which made way."""
    values: Sequence[TokenValues]
    """What the updates made of each token, with `logging.tokens`; of groups that came to other ranks, too."""


class StepLog:
    """Gathers what every rank knows of a step, and hands it to the telemetry once.

    Args:
        telemetry: gets the metrics and the samples.
        timers: the phases of the step.
        config: the run's. Where batches span weight updates, an engine without work for this one has work for the next.
    """

    def __init__(self, telemetry: Telemetry, timers: Timers, config: Config) -> None:
        self._telemetry, self._timers, self._in_flight = telemetry, timers, config.in_flight
        self._episodes, self._refill = config.has_episodes, config.rollout.refill.max_extra > 0
        self._replay = config.rollout.replay.size > 0
        self._became = {
            name: "scored 0" if function.on_error == "zero" else "left their groups"
            for name, function in config.rewards.items()
        }
        self._warned_inapplicable: set[str] = set()
        self._warned_no_signal = False

    def log(
        self,
        step: int,
        batch: Batch,
        stats: Mapping[str, float],
        restarts: int,
        peak: float,
        values: Sequence[TokenValues] = (),
    ) -> None:
        """Write the step's numbers and completions; every rank calls it.

        Args:
            step: its number.
            batch: this rank's, with rewards and advantages.
            stats: what the updates say, the same on all ranks.
            restarts: of this rank's engines, so far.
            peak: the most GPU memory that this rank's trainer took, in GiB.
            values: of each token that this rank trained on, with `logging.tokens`.
        """
        own_groups = [rows(step, group) for group in batch.groups]
        facts = [facts_of(one) for group in batch.groups for one in group.samples] if self._episodes else []
        ages = {place: one.age for place, one in batch.replayed.items()}
        own_report = RankReport(
            own_groups, batch.scoring, batch.usage, restarts, peak, facts, batch.dropped, batch.written, ages, values
        )
        everyone: list[RankReport] = gather_object([own_report])
        groups = [group for rank in everyone for group in rank.groups]
        metrics = sample_metrics(groups)
        if self._episodes:
            episodes = [one for rank in everyone for one in rank.episodes]
            samples = [row for group in groups for row in group]
            metrics |= episode_metrics(samples, episodes, sum(len(rank.dropped) for rank in everyone))
        scoring = RewardStats.together(rank.scoring for rank in everyone)
        self._warn(step, scoring, [text for rank in everyone for text in rank.dropped], metrics)
        phases = self._timers.take()
        tokens = sum(row["tokens"] for group in groups for row in group)
        own = {
            "perf/tokens_per_second": tokens / phases["time/step"],
            "perf/completion_tokens": float(tokens),
            "perf/peak_memory_gib": max(rank.peak for rank in everyone),
            "rollout/engine_restarts": float(sum(rank.restarts for rank in everyone)),
            "rollout/staleness": step - 1.0 - min(row["weight_version"] for group in groups for row in group),
        } | {f"rewards/{name}/errors": float(count) for name, count in scoring.errors.items()}
        if not self._in_flight:
            own["rollout/idle_fraction"] = idle_fraction([rank.usage for rank in everyone])
        if self._replay:
            own |= replay_metrics([age for rank in everyone for age in rank.ages.values()], len(groups))
        if self._refill:
            own["rollout/kept_fraction"] = len(groups) / sum(rank.written for rank in everyone)
        self._telemetry.log_step(step, {**metrics, **own, **stats, **phases}, groups, placed(everyone))

    def _warn(self, step: int, scoring: RewardStats, dropped: Sequence[str], metrics: Mapping[str, float]) -> None:
        for text in dropped[:1]:
            self._telemetry.warn(f"{text} ({len(dropped)} episodes of step {step} dropped)")
        for name, text in scoring.failures.items():
            self._telemetry.warn(f"{text} (reward {name}: {scoring.errors[name]} samples {self._became[name]})")
        inapplicable = {name for name in scoring.errors if f"rewards/{name}/mean" not in metrics}
        for name in sorted(inapplicable - self._warned_inapplicable):
            self._warned_inapplicable.add(name)
            self._telemetry.warn(f"reward {name} applied to no completion of step {step}: it returned None for all")
        if metrics["group/zero_spread_fraction"] == 1 and not self._warned_no_signal:
            self._warned_no_signal = True
            self._telemetry.warn(f"step {step} teaches nothing: the samples of each group all have the same reward")


def placed(everyone: Sequence[RankReport]) -> list[Placed]:
    """Return the values of all ranks' tokens, with the place of each sample among all ranks' completions."""
    if not any(report.values for report in everyone):
        return []
    numbers = {
        (rank, group, sample): number
        for number, (rank, group, sample) in enumerate(
            (rank, group, sample)
            for rank, report in enumerate(everyone)
            for group, rows in enumerate(report.groups)
            for sample in range(len(rows))
        )
    }
    return [
        (None if one.place.group in everyone[one.place.rank].ages else numbers[one.place], one)
        for report in everyone
        for one in report.values
    ]


def replay_metrics(ages: Sequence[int], count: int) -> dict[str, float]:
    """Return which share of a step's `count` groups has made way for groups of these ages, and the mean age."""
    found = {"rollout/replayed_fraction": len(ages) / count}
    return found | ({"rollout/replay_age": statistics.fmean(ages)} if ages else {})


def idle_fraction(usages: Sequence[Usage]) -> float:
    """Return the share of the engines' time after their last answer, while others still write.

    `usages` are those of all ranks, which start together: a rank that is ready waits for the slowest one.
    """
    until = [seconds for usage in usages for seconds in usage.until]
    whole = max(usage.whole for usage in usages)
    return 1 - sum(until) / (len(until) * whole) if whole else 0.0
