"""Requests over engines that come and go."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from sapo_rl.engines.base import Completion, IndexedRequest, Request, Sampling
from sapo_rl.errors import EngineError, EngineLost
from sapo_rl.rollout import dispatch
from sapo_rl.rollout.dispatch import Dispatcher
from sapo_rl.telemetry.steps import idle_fraction
from sapo_rl.types import Usage

SAMPLING = Sampling(1.0, 1.0, 0, 0.0, 1.0, 8, False)
DONE = Completion([3], truncated=False)


@dataclass
class Shaky:
    """Answers `lasts` requests, then is away for `away` calls, then answers all."""

    lasts: int
    away: int
    weight_version: int = 0
    before: threading.Event | None = None

    def stream(self, take: Callable[[], IndexedRequest | None], window: int, sampling: Sampling) -> Iterator[Any]:
        if self.before is not None:
            assert self.before.wait(10)
        if self.lasts == 0 and self.away > 0:
            self.away -= 1
            raise EngineLost("away")
        waiting: list[IndexedRequest] = []
        while True:
            while len(waiting) < window and (taken := take()) is not None:
                waiting.append(taken)
            if not waiting:
                return
            if self.lasts == 0 and self.away > 0:
                raise EngineLost("gone", waiting)
            self.lasts = max(0, self.lasts - 1)
            yield waiting.pop(0)[0], [DONE]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "RETRY_SECONDS", 0.01)


def run(engines: list[Shaky], requests: int, lost_timeout: float = 30.0) -> tuple[Counter[int], list[int], Usage]:
    answered: Counter[int] = Counter()
    by: list[int] = []

    def answer(engine: object, version: int, number: int, completions: list[Completion]) -> None:
        assert completions == [DONE]
        answered[number] += 1
        by.append(engines.index(engine))  # type: ignore[arg-type]

    asked = [Request([i], 1) for i in range(requests)]
    usage = Dispatcher(engines, asked, 4, SAMPLING, lost_timeout, answer).run()  # type: ignore[arg-type]
    return answered, by, usage


def test_what_a_lost_engine_leaves_is_answered_once_by_others() -> None:
    lost = threading.Event()

    class Last(Shaky):
        def stream(self, take: Callable[[], IndexedRequest | None], window: int, sampling: Sampling) -> Iterator[Any]:
            try:
                yield from super().stream(take, window, sampling)
            finally:
                lost.set()

    engines = [Last(lasts=3, away=10**6), Shaky(0, 0, before=lost)]
    answered, by, _ = run(engines, 20)
    assert answered == Counter(range(20))
    assert Counter(by) == {0: 3, 1: 17}


def test_an_engine_that_was_away_takes_part_again() -> None:
    answered, by, usage = run([Shaky(lasts=2, away=3)], 9)
    assert answered == Counter(range(9))
    assert len(by) == 9
    assert usage.until == [usage.whole]


def test_an_answer_has_the_version_of_the_weights_that_began_it() -> None:
    class Renewed(Shaky):
        def stream(self, take: Callable[[], IndexedRequest | None], window: int, sampling: Sampling) -> Iterator[Any]:
            for answer in super().stream(take, window, sampling):
                self.weight_version += 1
                yield answer

    versions = list[int]()
    engines: Any = [Renewed(0, 0)]
    asked = [Request([i], 1) for i in range(6)]
    Dispatcher(engines, asked, 4, SAMPLING, 30.0, lambda engine, version, *_: versions.append(version)).run()
    assert versions == [0, 0, 0, 0, 1, 2]  # four at a time


def test_without_any_engine_it_ends_with_the_reason() -> None:
    with pytest.raises(EngineError, match=r"no engine for 0.05 s; the last one: away"):
        run([Shaky(0, 10**6), Shaky(0, 10**6)], 3, lost_timeout=0.05)


def test_nothing_to_ask_is_answered_at_once() -> None:
    assert run([Shaky(0, 10**6)], 0)[0] == Counter()


def test_idle_is_the_share_of_time_after_an_engines_last_answer() -> None:
    assert idle_fraction([Usage([4.0, 2.0], 4.0)]) == pytest.approx(0.25)
    assert idle_fraction([Usage([4.0], 4.0), Usage([1.0], 1.0)]) == pytest.approx(0.375)  # rank 1 waits for rank 0
    assert idle_fraction([Usage([3.0, 3.0], 3.0)]) == 0.0
    assert idle_fraction([Usage([0.0], 0.0)]) == 0.0
