"""The rewards of some groups while they come in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from sapo_rl.rewards.registry import Score
from sapo_rl.types import Group, Prompt, RewardStats, Sample, Scores


@dataclass(slots=True, eq=False)
class Place:
    """A sample that is being scored."""

    prompt: Prompt
    sample: Sample
    rewards: dict[str, float | None] = field(default_factory=dict)
    """What is known of its rewards, by the function's name in the config; `name/key` are further numbers of one."""
    left: bool = False
    """Whether it leaves its group, because a function has failed on it."""

    def note(self, name: str, score: Score) -> None:
        """Take down what a function says of it."""
        own = score if isinstance(score, dict) else {"score": score}
        self.rewards |= {name if key == "score" else f"{name}/{key}": number for key, number in own.items()}


class Sheet:
    """Takes down what functions make of some groups, and resolves a future with it.

    Args:
        groups: to be scored.
        names: of the functions that score them, as the config has them.
    """

    def __init__(self, groups: Sequence[Group], names: Iterable[str]) -> None:
        self.future: Future[Scores] = Future()
        """Gets the groups with `sample.rewards[name]` for each function, and what happened meanwhile."""
        self.places = [[Place(group.prompt, sample) for sample in group.samples] for group in groups]
        """Those of each group."""
        self.open = 0
        """Calls that are yet to end."""
        self._groups = groups
        self._errors = dict.fromkeys(names, 0)
        self._failures: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """The names of the functions."""
        return list(self._errors)

    def fail(self, name: str, places: Sequence[Place], text: str, reward: float | None) -> None:
        """Count samples on which a function has failed, and give them this reward; without one they leave their group.

        `text` says what happened.
        """
        for place in places:
            place.rewards[name] = reward
            place.left = place.left or reward is None
        self._errors[name] += len(places)
        self._failures.setdefault(name, text)

    def finish(self) -> None:
        """Resolve the future; all rewards are known."""
        scored = [self._scored(*pair) for pair in zip(self._groups, self.places, strict=True)]
        places = [place for group in self.places for place in group if not place.left]
        inapplicable = {name: sum(place.rewards[name] is None for place in places) for name in self._errors}
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(Scores(scored, RewardStats(self._errors, inapplicable, self._failures)))

    def give_up(self, error: BaseException) -> None:
        """Fail the future."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def _scored(self, group: Group, places: Sequence[Place]) -> Group:
        found = [({name: place.rewards[name] for name in self._errors}, place) for place in places if not place.left]
        samples = [replace(one.sample, rewards=one.sample.rewards | own | one.rewards) for own, one in found]
        return replace(group, samples=samples)
