"""Requests over several engines, some of which may go away and come back meanwhile."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from sapo_rl.engines.base import Completion, Engine, IndexedRequest, Request, Sampling
from sapo_rl.errors import EngineError, EngineLost
from sapo_rl.types import Usage

POLL_SECONDS = 0.05
RETRY_SECONDS = 0.5


class Dispatcher:
    """Distributes a batch of requests over the engines.

    Each engine keeps `window` completions in flight; the requests of an engine that is lost are queued again for the
    others.

    Args:
        engines: asked in threads of their own.
        requests: answered exactly once each.
        window: completions that each engine has under way.
        sampling: of all requests.
        lost_timeout: seconds that all engines may be lost at the same time.
        answer: called with the engine, the version of the weights that it had when it took a request, the request's
            number and its completions; in the engine's thread.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        requests: Sequence[Request],
        window: int,
        sampling: Sampling,
        lost_timeout: float,
        answer: Callable[[Engine, int, int, list[Completion]], None],
    ) -> None:
        self._engines = engines
        self._window = window
        self._sampling = sampling
        self._lost_timeout = lost_timeout
        self._answer = answer
        self._left = deque(enumerate(requests))
        self._unanswered = len(requests)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._lost: dict[int, float] = {}
        """Since when an engine is lost, by its index."""
        self._until = [0.0] * len(engines)
        self._versions = [0] * len(requests)
        """The oldest weights that may have written a part of each answer."""

    def run(self) -> Usage:
        """Return when all requests are answered. Raises what an engine or `answer` raised, once all threads have ended.

        Raises:
            EngineError: all engines were lost for longer than `lost_timeout`.
        """
        start = time.perf_counter()
        if not self._unanswered:
            self._over.set()
        with ThreadPoolExecutor(len(self._engines)) as pool:
            futures = [pool.submit(self._work, index) for index in range(len(self._engines))]
        for future in futures:
            future.result()
        until = [max(0.0, at - start) for at in self._until]
        return Usage(until, max(until))

    def _work(self, index: int) -> None:
        """Until the batch is over: an engine that has nothing to do may have to take what another leaves."""
        try:
            while not self._over.is_set():
                if not self._left:
                    self._over.wait(POLL_SECONDS)
                    continue
                try:
                    self._stream(index)
                except EngineLost as lost:
                    self._left.extendleft(reversed(lost.unfinished))
                    self._lose(index, lost)
                    self._over.wait(RETRY_SECONDS)
        except BaseException:
            self._over.set()
            raise

    def _stream(self, index: int) -> None:
        engine = self._engines[index]
        for number, completions in engine.stream(lambda: self._take(index), self._window, self._sampling):
            self._answer(engine, self._versions[number], number, completions)
            self._until[index] = time.perf_counter()
            with self._lock:
                self._unanswered -= 1
                if not self._unanswered:
                    self._over.set()

    def _take(self, index: int) -> IndexedRequest | None:
        """Engines ask once they are sure to be there."""
        with self._lock:
            self._lost.pop(index, None)
            if not self._left or self._over.is_set():
                return None
            taken = self._left.popleft()
            self._versions[taken[0]] = self._engines[index].weight_version
            return taken

    def _lose(self, index: int, lost: EngineLost) -> None:
        now = time.perf_counter()
        with self._lock:
            self._lost.setdefault(index, now)
            all_since = max(self._lost.values()) if len(self._lost) == len(self._engines) else now
        if now - all_since > self._lost_timeout:
            raise EngineError(f"no engine for {self._lost_timeout:g} s; the last one: {lost}")
