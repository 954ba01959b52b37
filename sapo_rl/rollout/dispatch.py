"""Requests over engines, some of which may go away and come back meanwhile."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from sapo_rl.engines.base import Completion, Engine, Request, Sampling
from sapo_rl.errors import EngineError, EngineLost

RETRY_SECONDS = 0.5
"""Between two attempts at an engine that is lost."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The completions of a request, and where they come from.

    Example:
        >>> completions = [Completion([34, 2], truncated=False)]
        >>> answer = Answer(completions, oldest_version=3, newest_version=4, engine=0, at=12.5)
        >>> answer.newest_version - answer.oldest_version  # new weights came while it was written
        1
    """

    completions: list[Completion]
    oldest_version: int
    """Version of the weights that began them."""
    newest_version: int
    """Version of the weights that the engine had at their end; they may have written a part."""
    engine: int
    """Index of the engine that wrote them."""
    at: float
    """When they came, on the clock of `time.perf_counter`."""


@dataclass(eq=False, slots=True)
class Session:
    """Requests that one engine answers as long as it lives, because its cache holds what they have in common."""

    lane: _Lane | None = None
    """Who answers; the dispatcher's to set."""


@dataclass(order=True, slots=True)
class _Task:
    """A request from its submission to its answer; ordered by their tickets, which tell who comes first."""

    ticket: tuple[bool, int]
    request: Request = field(compare=False)
    sampling: Sampling = field(compare=False)
    session: Session | None = field(compare=False)
    future: Future[Answer] = field(compare=False, default_factory=Future)
    submitted: float = field(compare=False, default_factory=time.perf_counter)
    call: Future[list[Completion]] | None = field(compare=False, default=None)
    """The engine's, while it is under way there."""
    version: int = field(compare=False, default=0)


@dataclass(eq=False, slots=True)
class _Lane:
    """An engine, and what it has to do."""

    index: int
    engine: Engine
    load: int = 0
    """Completions under way."""
    queue: list[_Task] = field(default_factory=list)
    """A heap: requests of sessions that wait for room here."""
    lost_since: float | None = None
    recovering: bool = False


class Dispatcher:
    """Gives requests to the engines and brings their answers; any thread may use it.

    Requests are begun in the order in which they were submitted, by the engine that has the least to do. An engine
    takes on requests while it has fewer than `window` completions under way, the others wait. A lost engine's requests
    go back to the head of the queue, for the others or for its return, and `Engine.recover` is called until it is back.
    The requests of a session stay with one engine while that lives.

    Args:
        engines: all with the same weights.
        window: completions.
        lost_timeout: seconds that all engines may be lost at the same time while requests wait.

    Example:
        >>> answers = [dispatcher.submit(request, sampling) for request in requests]
        >>> completions = [answer.result().completions for answer in answers]
    """

    def __init__(self, engines: Sequence[Engine], window: int, lost_timeout: float) -> None:
        self._window, self._lost_timeout = window, lost_timeout
        self._lanes = [_Lane(index, engine) for index, engine in enumerate(engines)]
        self._tickets = itertools.count()
        self._lock = threading.Lock()
        self._open: dict[tuple[bool, int], _Task] = {}
        """By ticket, in the order of their submission: what is not answered yet."""
        self._queue: list[_Task] = []
        """A heap: what waits for any engine."""
        self._placing = False

    def submit(
        self, request: Request, sampling: Sampling, session: Session | None = None, urgent: bool = False
    ) -> Future[Answer]:
        """Return at once with a future of the answer; to cancel it ends the request. What is `urgent` goes before all.

        It fails with EngineError where no engine can answer, or with what the engine raised that refused the request.
        """
        return self._submit([request], sampling, session, later=not urgent)[0]

    def submit_all(self, requests: Sequence[Request], sampling: Sampling, urgent: bool = False) -> list[Future[Answer]]:
        """Do as `submit` with each; those for which there is room are taken up together by each engine.

        What is `urgent` goes before all that waits.
        """
        return self._submit(requests, sampling, None, later=not urgent)

    def _submit(
        self, requests: Sequence[Request], sampling: Sampling, session: Session | None, later: bool
    ) -> list[Future[Answer]]:
        with self._lock:
            tasks = [_Task((later, next(self._tickets)), request, sampling, session) for request in requests]
            self._open |= {task.ticket: task for task in tasks}
            for task in tasks:
                self._enqueue(task)
        for task in tasks:
            task.future.add_done_callback(partial(self._forget, task))
        self._place()
        return [task.future for task in tasks]

    def _forget(self, task: _Task, future: Future[Answer]) -> None:
        """Nobody waits for a task any more; what its engine still does for it is in vain."""
        with self._lock:
            self._open.pop(task.ticket, None)
            call = task.call
        if future.cancelled() and call is not None:
            call.cancel()

    def _enqueue(self, task: _Task) -> None:
        """Have a task wait, for its session's engine where that lives. The lock is held, as below."""
        lane = task.session.lane if task.session else None
        heapq.heappush(lane.queue if lane is not None and lane.lost_since is None else self._queue, task)

    def _place(self) -> None:
        """Begin what there is room for; one thread does at a time, so that requests are begun in their order."""
        while True:
            with self._lock:
                for lane in self._lanes:
                    if lane.lost_since is not None and not lane.recovering and self._open:
                        self._begin_recovery(lane)
                placed = {} if self._placing else self._take()
                self._placing = self._placing or bool(placed)
            if not placed:
                return
            try:
                for (lane, sampling), tasks in placed.items():
                    self._begin(lane, sampling, tasks)
            finally:
                self._placing = False

    def _take(self) -> dict[tuple[_Lane, Sampling], list[_Task]]:
        """Take out of the queues what there is room for, the least busy engine first."""
        placed: dict[tuple[_Lane, Sampling], list[_Task]] = {}
        while True:
            free = [lane for lane in self._lanes if lane.lost_since is None and lane.load < self._window]
            for lane in sorted(free, key=lambda lane: lane.load):
                if (task := self._next(lane)) is not None:
                    break
            else:
                return placed
            lane.load += task.request.n
            if task.session:
                task.session.lane = lane
            placed.setdefault((lane, task.sampling), []).append(task)

    def _next(self, lane: _Lane) -> _Task | None:
        """Take the oldest of what waits for this engine or for any."""
        while heaps := [heap for heap in (lane.queue, self._queue) if heap]:
            task = heapq.heappop(min(heaps, key=lambda heap: heap[0]))
            if task.future.done():
                continue
            home = task.session.lane if task.session else None
            if home is None or home is lane or home.lost_since is not None:
                return task
            heapq.heappush(home.queue, task)  # an earlier request of the session was begun since
        return None

    def _begin(self, lane: _Lane, sampling: Sampling, tasks: list[_Task]) -> None:
        version = lane.engine.weight_version
        calls = lane.engine.submit([task.request for task in tasks], sampling)
        for task, call in zip(tasks, calls, strict=True):
            with self._lock:
                task.version, task.call = version, call
            if task.future.done():  # before it had a call
                call.cancel()
            call.add_done_callback(partial(self._ended, lane, task))

    def _ended(self, lane: _Lane, task: _Task, call: Future[list[Completion]]) -> None:
        """A call is answered, has failed, or was cancelled."""
        at, version = time.perf_counter(), lane.engine.weight_version
        error = None if call.cancelled() else call.exception()
        with self._lock:
            task.call = None
            lane.load -= task.request.n
            if isinstance(error, EngineLost):
                if lane.lost_since is None:
                    lane.lost_since = at
                waiting, lane.queue = [*lane.queue, task], []
                for one in waiting:
                    self._enqueue(one)
        if call.cancelled():
            task.future.cancel()
        elif error is None:
            answer = Answer(call.result(), task.version, version, lane.index, at)
            if self._claim(task):
                task.future.set_result(answer)
        elif not isinstance(error, EngineLost) and self._claim(task):
            task.future.set_exception(error)
        self._place()

    def _claim(self, task: _Task) -> bool:
        """Return whether a task is still to be answered; only one who asks is told so."""
        with self._lock:
            waiting = self._open.pop(task.ticket, None) is not None
        return waiting and task.future.set_running_or_notify_cancel()

    def _begin_recovery(self, lane: _Lane) -> None:
        lane.recovering, lane.lost_since = True, time.perf_counter()
        threading.Thread(target=self._recover, args=(lane,), name="engine-recovery", daemon=True).start()

    def _recover(self, lane: _Lane) -> None:
        """Have a lost engine back, as long as requests wait; fail all where it cannot come back."""
        while True:
            error: Exception | None = None
            try:
                lane.engine.recover()
                back = True
            except EngineLost as lost:
                back, error = False, self._out_of_patience(lost)
            except Exception as raised:
                back, error = False, raised
            with self._lock:
                if back:
                    lane.lost_since = None
                lane.recovering = again = not back and error is None and bool(self._open)
            if error is not None:
                self._fail_all(error)
            if not again:
                self._place()
                return
            time.sleep(RETRY_SECONDS)

    def _out_of_patience(self, lost: EngineLost) -> EngineError | None:
        """Return an error where there has been no engine for too long."""
        with self._lock:
            since = [lane.lost_since for lane in self._lanes if lane.lost_since is not None]
            oldest = next(iter(self._open.values()), None)
        if oldest is None or len(since) < len(self._lanes):
            return None
        if time.perf_counter() - max(*since, oldest.submitted) <= self._lost_timeout:
            return None
        return EngineError(f"no engine for {self._lost_timeout:g} s; the last one: {lost}")

    def _fail_all(self, error: Exception) -> None:
        """Fail all that is not answered yet, and end what engines do for it."""
        with self._lock:
            waiting = list(self._open.values())
        for task in waiting:
            if self._claim(task):
                task.future.set_exception(error)
                if (call := task.call) is not None:  # else `_begin` finds the future done
                    call.cancel()
