"""Batches for the training loop, one after the other or some ahead of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Pending = TypeVar("Pending")
T = TypeVar("T")


class Prefetcher(Generic[Pending, T]):
    """Generates batches for the loop, one after the other or some ahead of it.

    The loop calls `take`, trains, calls `ready_for_new_weights`, publishes new weights, and begins again. A batch is
    begun at the earliest when the weights are `prefetch` versions older than those that it will be trained on.

    Args:
        begin: starts the batch of a step and returns at once; called in the loop's thread.
        finish: waits for what `begin` returned and makes the batch of it; where some are made ahead, in a thread that
            finishes them one after the other.
        last: the last step; nothing is begun beyond it.
        prefetch: batches that may be begun beyond the one that is trained on; 0 makes each when it is taken.
        in_flight: a batch may be under way while the weights change, and beside another; else each is begun when the
            one before it is finished, and `ready_for_new_weights` waits for it.
    """

    def __init__(
        self, begin: Callable[[int], Pending], finish: Callable[[Pending], T], last: int, prefetch: int, in_flight: bool
    ) -> None:
        self._begin = begin
        self._finish = finish
        self._last = last
        self._prefetch = prefetch if in_flight else min(1, prefetch)
        self._in_flight = in_flight
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout") if prefetch else None
        self._begun = 0
        self._coming: deque[Future[T]] = deque()
        self._waited = 0.0

    def take(self, step: int) -> T:
        """Return the batch of `step`; steps come in order."""
        if self._thread is None:
            return self._finish(self._begin(step))
        self._begun = max(self._begun, step - 1)  # a resumed loop starts anywhere
        self._begin_until(step + self._prefetch if self._in_flight else step)
        batch = self._result(self._coming.popleft())
        self._begin_until(step + self._prefetch)
        return batch

    def take_waited(self) -> float:
        """Return the seconds that the caller has waited for the thread since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def ready_for_new_weights(self) -> None:
        """Block until no batch is being generated, unless batches may span a weight update.

        Raises an error of the generation thread again.
        """
        if not self._in_flight:
            self.wait()

    def wait(self) -> None:
        """Return once all that is begun is finished, so that the engines are idle. Raises what making it raised."""
        for future in self._coming:
            self._result(future)

    def close(self) -> None:
        """Make nothing more; what is being made is not waited for."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin_until(self, step: int) -> None:
        assert self._thread is not None
        while self._begun < min(step, self._last):
            self._begun += 1
            self._coming.append(self._thread.submit(self._finish, self._begin(self._begun)))

    def _result(self, future: Future[T]) -> T:
        start = time.perf_counter()
        batch = future.result()
        self._waited += time.perf_counter() - start
        return batch
