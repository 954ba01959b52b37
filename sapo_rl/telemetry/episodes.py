"""A step's numbers of episodes with several turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from sapo_rl.types import Sample, Stop


class EpisodeFacts(NamedTuple):
    """What the metrics take of one episode."""

    turns: int
    forks: int
    trained: int
    """Tokens that the model wrote."""
    length: int
    """Those and the environment's."""
    stop: str
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
    return EpisodeFacts(
        turns=len(sample.turns),
        forks=len(sample.rows) - 1,
        trained=sample.num_trained,
        length=sum(len(row.token_ids) for row in sample.rows),
        stop=sample.stop.value,
        tool_calls=sample.info["tool_calls"],
        tool_failures=sample.info["tool_failures"],
        seconds=sample.info["seconds"],
        sent=sample.info["sent"],
        cached=sample.info["cached"],
    )


def episode_metrics(episodes: Sequence[EpisodeFacts], dropped: int) -> dict[str, float]:
    """Return `episode/*`, `stop/*`, `tools/*`, `time/environment` and `rollout/prefix_hit` of a step's episodes.

    There is at least one.

    Args:
        episodes: those that are left.
        dropped: how many the environment failed.
    """
    turns, calls = [one.turns for one in episodes], sum(one.tool_calls for one in episodes)
    length = sum(one.length for one in episodes)
    failures = sum(one.tool_failures for one in episodes)
    stops = [one.stop for one in episodes]
    return {
        "episode/turns/mean": statistics.fmean(turns),
        "episode/turns/max": float(max(turns)),
        "episode/masked_fraction": 1 - sum(one.trained for one in episodes) / max(1, length),
        "episode/forks": float(sum(one.forks for one in episodes)),
        "episode/dropped": float(dropped),
        "tools/call_frequency": calls / len(episodes),
        "tools/failure_frequency": failures / max(1, calls),
        "time/environment": statistics.fmean(one.seconds for one in episodes),
        "rollout/prefix_hit": sum(one.cached for one in episodes) / sum(one.sent for one in episodes),
    } | {f"stop/{stop}": stops.count(stop) / len(stops) for stop in Stop if stop is not Stop.ERROR}
