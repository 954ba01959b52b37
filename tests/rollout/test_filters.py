"""What is said of sampling filters."""

from __future__ import annotations

import pytest

from sapo_rl.config import RolloutConfig
from sapo_rl.rollout.filters import filter_warning


def test_without_filters_or_with_a_correction_there_is_nothing_to_say() -> None:
    assert filter_warning(RolloutConfig(temperature=0.7), corrected=False) is None
    assert filter_warning(RolloutConfig(top_p=0.9, repetition_penalty=1.1), corrected=True) is None


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        (RolloutConfig(top_p=0.9), ["rollout.top_p=0.9: ", "by at most 0.11 nats"]),
        (RolloutConfig(top_p=0.99), ["rollout.top_p=0.99: ", "by at most 0.01 nats"]),
        (RolloutConfig(top_p=0.9, top_k=20), ["rollout.top_p=0.9, rollout.top_k=20: ", "0.07 at top_k=50"]),
        (RolloutConfig(min_p=0.05), ["rollout.min_p=0.05: ", "0.2 at min_p=0.1"]),
    ],
)
def test_filters_are_named_with_how_much_they_do(rollout: RolloutConfig, words: list[str]) -> None:
    told = filter_warning(rollout, corrected=False)
    assert told and all(word in told for word in words) and "\n" not in told
