"""The rewards of a batch while they come in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from sapo_rl.rewards.runner.blame import Call
from sapo_rl.types import Group, RewardStats, Scores


class ScoreSheet:
    """Notes what the calls of a batch's groups return, and makes scored groups of it.

    Args:
        names: of all functions, as the config has them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._errors = dict.fromkeys(names, 0)
        self._failures: dict[str, str] = {}
        self._entries: dict[int, tuple[Group, list[dict[str, float | None]]]] = {}
        """The groups with a dictionary a sample, by the identity of the group: a prompt may be in a batch twice."""

    def add(self, group: Group) -> None:
        """Expect the rewards of a group."""
        self._entries[id(group)] = group, [{} for _ in group.samples]

    def note(self, call: Call, scores: Sequence[float | None]) -> None:
        """Enter what a call returned, one value a sample of it."""
        _, rewards = self._entries[id(call.group)]
        for position, value in zip(call.positions, scores, strict=True):
            rewards[position][call.name] = value

    def fail(self, call: Call, text: str) -> None:
        """Score the samples of a failed call 0 and count them; `text` says what happened."""
        self.note(call, [0.0] * len(call.positions))
        self._errors[call.name] += len(call.positions)
        self._failures.setdefault(call.name, text)

    def scores(self, groups: Iterable[Group]) -> Scores:
        """Return these groups, all of them added and complete, with their samples' rewards."""
        scored = [self._scored(group) for group in groups]
        samples = [sample for group in scored for sample in group.samples]
        inapplicable = {name: sum(sample.rewards[name] is None for sample in samples) for name in self._errors}
        return Scores(scored, RewardStats(self._errors, inapplicable, self._failures))

    def _scored(self, group: Group) -> Group:
        _, rewards = self._entries[id(group)]
        found = [{name: own[name] for name in self._errors} for own in rewards]
        pairs = zip(group.samples, found, strict=True)
        return replace(group, samples=[replace(sample, rewards=sample.rewards | own) for sample, own in pairs])
