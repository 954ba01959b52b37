"""Batches for the training loop, one after the other or one ahead of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Producer(Generic[T]):
    """Calls `make(step)` for the loop.

    Without overlap `take` makes the batch there and then. With it, `take` hands out the batch that is ready and has the
    next one made in a thread, with the weights that the engines hold at that moment, while the caller trains: that
    batch will be one version of the weights old when it is trained on. The caller may touch the engines between
    `wait` and the next `take`.

    Args:
        make: makes the batch of a step.
        last: the last step; nothing is made beyond it.
        overlap: one ahead.
    """

    def __init__(self, make: Callable[[int], T], last: int, overlap: bool) -> None:
        self._make = make
        self._last = last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout") if overlap else None
        self._coming: Future[T] | None = None
        self._waited = 0.0

    def take(self, step: int) -> T:
        """Return the batch of `step`; steps come in order."""
        if self._thread is None:
            return self._make(step)
        self._coming = self._coming or self._thread.submit(self._make, step)
        self.wait()
        batch = self._coming.result()
        self._coming = self._thread.submit(self._make, step + 1) if step < self._last else None
        return batch

    def take_waited(self) -> float:
        """Return the seconds that the caller has waited for the thread since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def wait(self) -> None:
        """Return once no batch is being made, so that the engines are idle. Raises what making it raised."""
        if self._coming is not None:
            start = time.perf_counter()
            self._coming.result()
            self._waited += time.perf_counter() - start

    def close(self) -> None:
        """Make nothing more; a batch that is being made is not waited for."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
