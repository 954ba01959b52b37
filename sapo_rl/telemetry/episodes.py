"""A step's numbers of episodes with several turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from sapo_rl.telemetry.sinks.completions import Row
from sapo_rl.types import Sample, Stop


class EpisodeFacts(NamedTuple):
    """What the metrics take of one episode beside its `Row`."""

    environment: str
    """Its name among several; empty where there is one."""
    tool_calls: int
    tool_failures: int
    seconds: float
    """What the calls of its environment took."""
    sent: int
    """Tokens of the prompts of all turns."""
    cached: int
    """Those of them that an engine's cache held."""


def facts_of(sample: Sample) -> EpisodeFacts:
    """Return the facts of an episode that `rollout/episode.py` has played."""
    return EpisodeFacts(*(sample.info[name] for name in EpisodeFacts._fields))


def episode_metrics(rows: Sequence[Row], facts: Sequence[EpisodeFacts], dropped: int) -> dict[str, float]:
    """Return `episode/*`, `stop/*`, `tools/*`, `time/environment`, `rollout/prefix_hit` and `environment/*` of a step.

    Args:
        rows: those that are left, at least one.
        facts: of the same, in their order.
        dropped: how many the environment failed.
    """
    turns, calls = [row["turns"] for row in rows], sum(one.tool_calls for one in facts)
    length, trained = (sum(row[name] for row in rows) for name in ("length", "tokens"))
    stops = [row["stop"] for row in rows]
    metrics = {
        "episode/turns/mean": statistics.fmean(turns),
        "episode/turns/max": float(max(turns)),
        "episode/masked_fraction": 1 - trained / max(1, length),
        "episode/forks": float(sum(row["rows"] - 1 for row in rows)),
        "episode/dropped": float(dropped),
        "tools/call_frequency": calls / len(facts),
        "tools/failure_frequency": sum(one.tool_failures for one in facts) / max(1, calls),
        "time/environment": statistics.fmean(one.seconds for one in facts),
        "rollout/prefix_hit": sum(one.cached for one in facts) / sum(one.sent for one in facts),
    } | {f"stop/{stop}": stops.count(stop) / len(stops) for stop in Stop}
    for name in sorted({one.environment for one in facts if one.environment}):
        own = [row for row, one in zip(rows, facts, strict=True) if one.environment == name]
        rewards = [row["reward"] for row in own if row["reward"] is not None]
        metrics[f"environment/{name}/fraction"] = len(own) / len(rows)
        metrics[f"environment/{name}/turns"] = statistics.fmean(row["turns"] for row in own)
        if rewards:
            metrics[f"environment/{name}/reward"] = statistics.fmean(rewards)
    return metrics
