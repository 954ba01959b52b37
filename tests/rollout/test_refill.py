"""Groups without spread are replaced by those of further prompts: which, how many, and in which order."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import one_row

from sapo_rl.advantages import has_spread
from sapo_rl.config import RewardFunctionConfig
from sapo_rl.data import PromptSampler
from sapo_rl.rewards import Scoring
from sapo_rl.rollout.collector import RolloutResult
from sapo_rl.rollout.refill import kept, write_refilled
from sapo_rl.types import Group, Prompt, RewardStats, Scores, Usage

BOTH = {"one": RewardFunctionConfig("one"), "two": RewardFunctionConfig("two", weight=-1.0)}


def prompts(*indices: int) -> list[Prompt]:
    return [Prompt(index, [1], "Q?", {}) for index in indices]


class Late:
    """Writes groups, and has them scored, in any order; keeps those whose prompt is in `teaching`."""

    def __init__(self, teaching: Sequence[int], seed: int) -> None:
        self.teaching, self._random, self.calls = {*teaching}, random.Random(seed), 0

    def write(
        self, some: Sequence[Prompt], step: int, n: int | None = None, on_group: Callable[[Group], object] = print
    ) -> RolloutResult:
        self.calls += 1
        groups = [Group(prompt, [one_row([0])]) for prompt in some]
        for group in self._random.sample(groups, len(groups)):
            on_group(group)
        return RolloutResult(groups, Usage([1.0, 0.0], 1.0), [str(prompt.index) for prompt in some])

    def submit(self, group: Group) -> Future[Scores]:
        future: Future[Scores] = Future()
        scores = Scores([group], RewardStats({}, {}, {}))

        def finish() -> None:
            if future.set_running_or_notify_cancel():
                future.set_result(scores)

        threading.Timer(self._random.random() / 300, finish).start()
        return future

    def keeps(self, group: Group) -> bool:
        return group.prompt.index in self.teaching

    def refilled(self, own: Sequence[int], further: Sequence[int]) -> RolloutResult:
        with Scoring(self.submit, lambda groups: self.submit(groups[0]), []) as scoring:
            return write_refilled(self, prompts(*own), prompts(*further), 1, scoring, self.keeps)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 11)), st.integers(0, 8), st.integers(0, 9))
def test_as_many_are_replaced_as_teach_nothing_whatever_is_ready_first(
    teaching: set[int], further: int, seed: int
) -> None:
    own, others = range(4), range(4, 4 + further)
    result = Late([*teaching], seed).refilled(own, others)
    written = [group.prompt.index for group in result.groups]
    taken = len(written) - 4
    assert written == [*own, *others[:taken]]
    flat = sum(index not in teaching for index in written)
    assert flat == taken if taken < further else flat >= taken
    assert sorted(result.dropped) == sorted(map(str, written))
    assert result.usage.until[1] == 0 and result.usage.whole == result.usage.until[0] >= 1


def test_those_that_stay_are_taken_first_others_fill_the_batch_and_the_order_stays() -> None:
    late = Late([1, 4, 5], 0)
    groups = late.refilled(range(4), range(4, 6)).groups
    assert [group.prompt.index for group in kept(groups, 4, late.keeps)] == [0, 1, 4, 5]
    assert [group.prompt.index for group in kept(groups, 2, late.keeps)] == [1, 4]


def test_what_writing_or_scoring_raises_ends_it() -> None:
    late = Late([], 0)

    def write(some: Sequence[Prompt], *rest: object, **more: object) -> RolloutResult:
        if some[0].index == 4:
            raise OSError("no engine is left")
        return Late.write(late, some, *rest, **more)  # type: ignore[arg-type]

    late.write = write  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no engine is left"):
        late.refilled(range(4), range(4, 6))

    def submit(group: Group) -> Future[Scores]:
        future: Future[Scores] = Future()
        future.set_exception(ValueError("no score"))
        return future

    late.submit = submit  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no score"):
        late.refilled(range(4), range(4, 6))


@pytest.mark.parametrize(
    ("rewards", "combine", "least", "expected"),
    [
        ([(1, 0), (1, 0)], "sum", 0.0, False),
        ([(1, 0), (0, 0)], "sum", 0.0, True),
        ([(1, 0), (0, 0)], "sum", 1.0, False),
        ([(1, 1), (0, 0)], "sum", 0.0, False),
        ([(1, 1), (0, 0)], "normalize", 0.0, True),
        ([(None, None), (0, 0)], "sum", 0.0, False),
        ([(0.1 + 0.2, 0), (0.3, 0)], "sum", 0.0, False),
        ([], "sum", 0.0, False),
        ([], "normalize", 0.0, False),
    ],
)
def test_whether_a_group_has_spread(
    rewards: list[tuple[float, float]], combine: str, least: float, expected: bool
) -> None:
    samples = [one_row([0], rewards=dict(zip(BOTH, pair, strict=True))) for pair in rewards]
    assert has_spread(Group(prompts(0)[0], samples), BOTH, combine, least) is expected


def test_further_prompts_are_others_and_the_same_each_time() -> None:
    sampler = PromptSampler(20, 8, seed=3, shuffle=True)
    drawn, before = sampler.next(1), sampler.state_dict()
    further = sampler.further(drawn, 6, 1)
    assert len({*further, *drawn}) == 14
    assert sampler.state_dict() == before
    assert further == PromptSampler(20, 8, seed=3, shuffle=True).further(drawn, 6, 1) != sampler.further(drawn, 6, 2)
    assert len(sampler.further(drawn, 50, 1)) == 12
