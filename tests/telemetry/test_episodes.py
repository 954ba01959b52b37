"""The numbers of episodes with several turns."""

from __future__ import annotations

from sapo_rl.telemetry.episodes import EpisodeFacts, episode_metrics, facts_of
from sapo_rl.telemetry.progress import phases
from sapo_rl.types import Row, Sample, Stop, Turn


def test_facts_and_metrics_count_turns_tokens_tools_and_why_episodes_ended() -> None:
    rows = [Row([1], [2, 3, 4, 5], [(0, 1), (3, 4)]), Row([1, 9], [6, 7], [(0, 2)])]
    info = {"tool_calls": 3, "tool_failures": 1, "seconds": 0.5, "sent": 30, "cached": 16}
    turns = [Turn(0, 1), Turn(3, 4), Turn(0, 2, 1)]
    first = facts_of(Sample(rows, Stop.TURNS, (0, 0), turns, info=info))
    assert first == EpisodeFacts(3, 1, 4, 6, "turns", 3, 1, 0.5, 30, 16)
    metrics = episode_metrics([first, EpisodeFacts(1, 0, 2, 2, "stop", 0, 0, 1.5, 10, 0)], dropped=2)
    assert metrics == {
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


def test_the_wait_for_an_environment_is_no_phase_of_its_own() -> None:
    record = {"step": 1, "time/step": 5.0, "time/rollout": 3.0, "time/update": 2.0, "time/environment": 1.5}
    assert phases(record) == {"rollout": 3.0, "update": 2.0}
