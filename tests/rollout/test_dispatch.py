"""Requests over engines that come and go."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import until

from sapo_rl.engines.base import Completion, Request, Sampling, failed
from sapo_rl.errors import EngineError, EngineLost
from sapo_rl.rollout import dispatch
from sapo_rl.rollout.dispatch import Answer, Dispatcher, Session
from sapo_rl.telemetry.steps import idle_fraction
from sapo_rl.types import Usage

SAMPLING = Sampling(1.0, 1.0, 0, 0.0, 1.0, 8, False)


@dataclass
class Manual:
    """An engine that answers when the test says so; while it is not there, it takes nothing."""

    here: bool = True
    gone_for_good: bool = False
    weight_version: int = 0
    window: int = 10**9
    calls: list[tuple[Request, Future[list[Completion]]]] = field(default_factory=list)
    """Under way, the oldest first."""
    bursts: list[int] = field(default_factory=list)
    """How many requests came together."""
    asked: list[int] = field(default_factory=list)
    """The first token of each request, in the order in which they came."""
    deaths: int = 0
    recoveries: int = 0
    on_request: Callable[[Manual, Request], None] = lambda engine, request: None

    @property
    def load(self) -> int:
        return sum(request.n for request, call in self.calls if not call.done())

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> list[Future[list[Completion]]]:
        assert sampling == SAMPLING
        if not self.here:
            return [failed(EngineLost("away")) for _ in requests]
        self.bursts.append(len(requests))
        for request in requests:
            assert self.load < self.window
            self.on_request(self, request)
            self.asked.append(request.token_ids[0])
            self.calls.append((request, Future()))
        return [call for _, call in self.calls[-len(requests) :]]

    def answer(self, index: int = 0) -> None:
        request, call = self.calls.pop(index)
        if call.set_running_or_notify_cancel():
            call.set_result([Completion([request.token_ids[0], i], truncated=False) for i in range(request.n)])

    def refuse(self, error: Exception, index: int = 0) -> None:
        self.calls.pop(index)[1].set_exception(error)

    def die(self) -> None:
        self.here = False
        self.deaths += 1
        for _, call in self.calls:
            if call.set_running_or_notify_cancel():
                call.set_exception(EngineLost("gone"))
        self.calls = []

    def recover(self) -> None:
        self.recoveries += 1
        if self.gone_for_good:
            raise EngineError("it will not come back")
        if not self.here:
            raise EngineLost("away")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "RETRY_SECONDS", 0.001)


def dispatcher_of(*engines: Manual, window: int = 4, lost_timeout: float = 30.0) -> Dispatcher:
    for engine in engines:
        engine.window = window
    return Dispatcher(engines, window, lost_timeout)  # type: ignore[arg-type]


def requests(count: int, n: int = 1, first: int = 0) -> list[Request]:
    return [Request([first + i], n) for i in range(count)]


def first_token(future: Future[Answer]) -> int:
    return future.result(10).completions[0].token_ids[0]


def test_engines_share_evenly_and_take_more_as_they_finish() -> None:
    one, two = Manual(), Manual()
    answers = dispatcher_of(one, two).submit_all(requests(12), SAMPLING)
    assert (one.asked, two.asked) == ([0, 2, 4, 6], [1, 3, 5, 7])
    assert one.bursts == two.bursts == [4]  # what there is room for comes together
    one.answer(2)
    assert one.asked[4:] == [8]
    two.answer()
    two.answer()
    assert two.asked[4:] == [9, 10]
    assert [i for i, future in enumerate(answers) if future.done()] == [1, 3, 4]
    while one.calls or two.calls:
        (one if one.calls else two).answer()
    assert [first_token(future) for future in answers] == list(range(12))
    assert Counter(future.result().engine for future in answers) == {0: 12 - len(two.asked), 1: len(two.asked)}


def test_a_group_may_be_larger_than_the_room_that_is_left() -> None:
    engine = Manual()
    answers = dispatcher_of(engine).submit_all(requests(4, n=3), SAMPLING)
    assert engine.asked == [0, 1]
    engine.answer()
    assert engine.asked == [0, 1, 2]
    assert len(answers[0].result().completions) == 3
    huge = Manual()
    dispatcher_of(huge).submit(Request([0], 100), SAMPLING)
    assert huge.asked == [0]


def test_requests_that_wait_are_begun_in_the_order_of_their_submission() -> None:
    engine = Manual()
    dispatcher = dispatcher_of(engine, window=2)
    for i in range(6):
        dispatcher.submit(Request([i], 1), SAMPLING)
    while engine.calls:
        engine.answer(-1)
    assert engine.asked == list(range(6))


def test_what_is_urgent_is_begun_before_all_that_waits() -> None:
    engine = Manual()
    dispatcher = dispatcher_of(engine, window=2)
    dispatcher.submit_all(requests(4), SAMPLING)
    dispatcher.submit_all(requests(2, first=10), SAMPLING, urgent=True)
    while engine.calls:
        engine.answer()
    assert engine.asked == [0, 1, 10, 11, 2, 3]


def test_what_a_lost_engine_leaves_is_begun_by_others_before_anything_newer() -> None:
    one, two = Manual(), Manual()
    answers = dispatcher_of(one, two, window=3).submit_all(requests(9), SAMPLING)
    assert (one.asked, two.asked) == ([0, 2, 4], [1, 3, 5])
    one.answer()
    one.die()
    while two.calls:
        two.answer()
    assert two.asked == [1, 3, 5, 2, 4, 6, 7, 8]
    assert [first_token(future) for future in answers] == list(range(9))
    assert [future.result().engine for future in answers] == [0, *[1] * 8]


def test_an_engine_that_comes_back_takes_part_again_and_keeps_what_nobody_else_took() -> None:
    engine = Manual()
    answers = dispatcher_of(engine).submit_all(requests(6), SAMPLING)
    engine.die()
    until(lambda: engine.recoveries > 2)
    assert not engine.calls
    engine.here = True
    until(lambda: len(engine.calls) == 4)
    assert engine.asked[4:] == [0, 1, 2, 3]
    while engine.calls:
        engine.answer()
    assert [first_token(future) for future in answers] == list(range(6))


def test_a_lost_engine_gets_nothing_before_it_has_recovered_and_is_left_alone_while_nothing_waits() -> None:
    one, two = Manual(), Manual()
    dispatcher = dispatcher_of(one, two)
    first = dispatcher.submit_all(requests(2), SAMPLING)
    one.die()
    until(lambda: one.recoveries > 2)
    for _ in range(2):
        two.answer()
    assert sorted(map(first_token, first)) == [0, 1]
    time.sleep(0.05)
    recoveries = one.recoveries
    time.sleep(0.05)
    assert one.recoveries == recoveries
    second = dispatcher.submit_all(requests(4, first=10), SAMPLING)
    assert two.asked[2:] == [10, 11, 12, 13]
    until(lambda: one.recoveries > recoveries)
    one.here = True
    third = dispatcher.submit_all(requests(2, first=20), SAMPLING)
    until(lambda: one.asked[1:] == [20, 21])
    for engine in (one, two):
        while engine.calls:
            engine.answer()
    assert [first_token(future) for future in (*second, *third)] == [10, 11, 12, 13, 20, 21]


def test_an_answer_has_the_versions_of_the_weights_at_its_begin_and_end() -> None:
    engine = Manual(weight_version=5)
    answers = dispatcher_of(engine).submit_all(requests(6), SAMPLING)
    for _ in range(6):
        engine.answer()
        engine.weight_version += 1
    found = [(future.result().oldest_version, future.result().newest_version) for future in answers]
    assert found == [(5, 5), (5, 6), (5, 7), (5, 8), (5, 9), (6, 10)]


def test_an_answer_is_by_the_weights_of_the_engine_that_gave_it_in_the_end() -> None:
    old, new = Manual(weight_version=1), Manual(weight_version=2)
    (answer,) = dispatcher_of(old, new).submit_all(requests(1), SAMPLING)
    old.die()
    new.answer()
    assert (answer.result().oldest_version, answer.result().newest_version, answer.result().engine) == (2, 2, 1)


def test_without_any_engine_what_waits_fails_with_the_reason_and_the_next_request_tries_again() -> None:
    one, two = Manual(here=False), Manual(here=False)
    dispatcher = dispatcher_of(one, two, lost_timeout=0.05)
    for future in dispatcher.submit_all(requests(20), SAMPLING):
        with pytest.raises(EngineError, match=r"no engine for 0.05 s; the last one: away"):
            future.result(10)
    one.here = True
    later = dispatcher.submit(Request([7], 1), SAMPLING)
    until(lambda: bool(one.calls))
    one.answer()
    assert first_token(later) == 7


def test_what_is_urgent_goes_before_what_waits() -> None:
    engine = Manual()
    dispatcher = dispatcher_of(engine, window=4)
    dispatcher.submit_all(requests(8), SAMPLING)
    dispatcher.submit(Request([77], 1), SAMPLING, Session(), urgent=True)
    engine.answer()
    engine.answer()
    assert engine.asked == [0, 1, 2, 3, 77, 4]


def test_engines_that_were_away_while_nothing_waited_have_their_time() -> None:
    engine = Manual(here=False)
    dispatcher = dispatcher_of(engine, lost_timeout=0.3)
    first = dispatcher.submit(Request([0], 1), SAMPLING)
    until(lambda: engine.recoveries > 0)
    first.cancel()
    time.sleep(0.4)
    later = dispatcher.submit(Request([1], 1), SAMPLING)
    time.sleep(0.05)
    assert not later.done()
    engine.here = True
    until(lambda: bool(engine.calls))
    engine.answer()
    assert first_token(later) == 1


def test_an_engine_that_will_not_come_back_fails_all_that_waits() -> None:
    one, two = Manual(gone_for_good=True), Manual()
    answers = dispatcher_of(one, two).submit_all(requests(20), SAMPLING)
    one.die()
    for future in answers:
        with pytest.raises(EngineError, match="will not come back"):
            future.result(10)
    until(lambda: all(call.cancelled() for _, call in two.calls))


def test_a_refused_request_fails_alone() -> None:
    engine = Manual()
    good, bad = dispatcher_of(engine).submit_all(requests(2), SAMPLING)
    engine.refuse(EngineError("too long"), 1)
    with pytest.raises(EngineError, match="too long"):
        bad.result(10)
    engine.answer()
    assert first_token(good) == 0


def test_an_engine_that_refuses_everything_at_once_refuses_a_long_queue() -> None:
    class Refusing(Manual):
        def submit(self, requests: Sequence[Request], sampling: Sampling) -> list[Future[list[Completion]]]:
            return [failed(EngineError("no")) for _ in requests]

    answers = dispatcher_of(Refusing()).submit_all(requests(5000), SAMPLING)
    assert {str(future.exception(10)) for future in answers} == {"no"}


def test_a_cancelled_request_makes_room() -> None:
    engine = Manual()
    answers = dispatcher_of(engine, window=2).submit_all(requests(5), SAMPLING)
    assert answers[2].cancel()  # still waits
    assert answers[0].cancel()
    assert engine.calls[0][1].cancelled()
    assert engine.asked == [0, 1, 3]
    for _ in range(4):
        engine.answer()
    assert [future.cancelled() for future in answers] == [True, False, True, False, False]
    assert engine.asked == [0, 1, 3, 4]
    assert not answers[1].cancel()


def test_what_an_engine_cancels_is_cancelled() -> None:
    engine = Manual()
    (answer,) = dispatcher_of(engine).submit_all(requests(1), SAMPLING)
    engine.calls[0][1].cancel()
    with pytest.raises(CancelledError):
        answer.result(10)


def test_the_requests_of_a_session_stay_with_their_engine_while_it_lives() -> None:
    one, two, three = Manual(), Manual(), Manual()
    dispatcher = dispatcher_of(one, two, three, window=1)
    session = Session()
    first = [dispatcher.submit(Request([i], 1), SAMPLING, session) for i in range(3)]
    other = dispatcher.submit(Request([9], 1), SAMPLING)
    assert (one.asked, two.asked, three.asked) == ([0], [9], [])  # the second waits for its own engine
    one.answer()
    one.answer()
    assert (one.asked, two.asked, three.asked) == ([0, 1, 2], [9], [])
    one.die()
    assert three.asked == [2]
    one.here = True
    three.answer()
    dispatcher.submit(Request([3], 1), SAMPLING, session)
    assert three.asked == [2, 3]
    two.answer()
    assert [first_token(future) for future in (*first, other)] == [0, 1, 2, 9]


def test_thousands_of_episodes_in_one_loop_and_some_of_them_given_up() -> None:
    class Prompt(Manual):
        """Answers from a thread of its own."""

        pool = ThreadPoolExecutor(1)

        def submit(self, requests: Sequence[Request], sampling: Sampling) -> list[Future[list[Completion]]]:
            return [self.pool.submit(lambda r=r: [Completion([*r.token_ids, 1], False)]) for r in requests]

    dispatcher = dispatcher_of(Prompt(), Prompt(), window=64)

    async def episode(start: int) -> list[int]:
        session, tokens = Session(), [start]
        for _ in range(5):
            answer = await asyncio.wrap_future(dispatcher.submit(Request(tokens, 1), SAMPLING, session))
            tokens = answer.completions[0].token_ids
        return tokens

    async def all_of_them() -> list[Any]:
        tasks = [asyncio.create_task(episode(start)) for start in range(2000)]
        await asyncio.sleep(0)
        for task in tasks[::10]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(all_of_them())
    for start, tokens in enumerate(found):
        assert isinstance(tokens, asyncio.CancelledError) if start % 10 == 0 else tokens == [start, 1, 1, 1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 4), window=st.integers(1, 6))
def test_every_request_is_answered_once_whatever_happens_to_the_engines(
    data: st.DataObject, count: int, window: int
) -> None:
    """Engines die, come back and answer, requests come and are given up, in any order."""
    homes: dict[int, tuple[Manual, int]] = {}

    def check_session(engine: Manual, request: Request) -> None:
        _, number = request.token_ids
        if number in homes:
            home, deaths = homes[number]
            assert home is engine or home.deaths > deaths
        homes[number] = engine, engine.deaths

    engines = [Manual(on_request=check_session) for _ in range(count)]
    dispatcher = dispatcher_of(*engines, window=window)
    sessions = [Session() for _ in range(3)]
    answers: list[Future[Answer]] = []
    resolved: Counter[int] = Counter()
    cancelled: set[int] = set()
    for action in data.draw(
        st.lists(st.sampled_from(["ask", "ask", "answer", "answer", "die", "return", "cancel"]), max_size=60)
    ):
        engine = data.draw(st.sampled_from(engines))
        if action == "ask":
            index, number = len(answers), data.draw(st.integers(0, 5))
            session = sessions[number] if number < 3 else None
            request = Request([index, number if session else 100 + index], data.draw(st.integers(1, 3)))
            answers.append(dispatcher.submit(request, SAMPLING, session))
            answers[-1].add_done_callback(lambda _, index=index: resolved.update([index]))
        elif action == "answer" and engine.calls:
            engine.answer(data.draw(st.integers(0, len(engine.calls) - 1)))
        elif action == "die":
            engine.die()
        elif action == "return":
            engine.here = True
        elif action == "cancel" and answers:
            index = data.draw(st.integers(0, len(answers) - 1))
            if answers[index].cancel():
                cancelled.add(index)
    for engine in engines:
        engine.here = True
    deadline = time.monotonic() + 20
    while not all(future.done() for future in answers):
        assert time.monotonic() < deadline
        for engine in engines:
            while engine.calls:
                engine.answer()
        time.sleep(0.0005)
    assert {index for index, future in enumerate(answers) if future.cancelled()} == cancelled
    assert resolved == Counter(range(len(answers)))
    for index, future in enumerate(answers):
        if index not in cancelled:
            assert first_token(future) == index


def test_idle_is_the_share_of_time_after_an_engines_last_answer() -> None:
    assert idle_fraction([Usage([4.0, 2.0], 4.0)]) == pytest.approx(0.25)
    assert idle_fraction([Usage([4.0], 4.0), Usage([1.0], 1.0)]) == pytest.approx(0.375)  # rank 1 waits for rank 0
    assert idle_fraction([Usage([3.0, 3.0], 3.0)]) == 0.0
    assert idle_fraction([Usage([0.0], 0.0)]) == 0.0
