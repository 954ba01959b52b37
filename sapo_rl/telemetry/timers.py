"""Where the time of a step goes: `with timers("rollout"): ...`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

ASIDE = ("eval",)
"""Phases that are timed, but are no part of a step."""
ON_DEVICE = ("old_logps", "update")
"""Phases whose work a GPU does while the host already queues what comes after."""


class Event(Protocol):
    """A mark in a device's queue of work, such as `torch.cuda.Event(enable_timing=True)`."""

    def record(self) -> Any:
        """Put the mark behind what is queued so far."""
        ...

    def synchronize(self) -> Any:
        """Wait until the device has come to the mark."""
        ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Return the milliseconds from this mark to `end_event`; the device has come to both."""
        ...


class Timers:
    """Adds up seconds by phase: those of the wall clock, or, in the phases `ON_DEVICE`, those that the GPU took.

    The clock of the steps starts with the first phase and never stops, so that a step's time holds everything, what
    is in no phase included, except the phases in `ASIDE`. Several threads may time phases; one calls `take`.

    Args:
        event: makes a mark in the queue of a GPU; None, without one, times every phase by the clock. The marks are read
            by `take`: no phase waits for the GPU.
    """

    def __init__(self, event: Callable[[], Event] | None = None) -> None:
        self._event = event
        self._seconds: dict[str, float] = {}
        self._marks: list[tuple[str, Event, Event]] = []
        self._since: float | None = None
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the body of a `with`, one that raises included; a phase may occur several times in a step."""
        start = time.perf_counter()
        self._since = start if self._since is None else self._since
        marks = (self._event(), self._event()) if self._event is not None and phase in ON_DEVICE else None
        if marks:
            marks[0].record()
        try:
            yield
        finally:
            if marks:
                marks[1].record()
                self._marks.append((phase, *marks))
            else:
                self._add(phase, time.perf_counter() - start)

    def take(self) -> dict[str, float]:
        """Return `time/<phase>` for each phase since the last call, and `time/step`, all in seconds; begin anew."""
        for phase, begin, end in self._marks:
            end.synchronize()
            self._add(phase, begin.elapsed_time(end) / 1e3)
        with self._lock:
            now, taken = time.perf_counter(), self._seconds
            elapsed = now - (now if self._since is None else self._since)
            self._seconds, self._marks, self._since = {}, [], now
        aside = sum(taken.get(phase, 0.0) for phase in ASIDE)
        return {f"time/{phase}": seconds for phase, seconds in taken.items()} | {"time/step": elapsed - aside}

    def _add(self, phase: str, seconds: float) -> None:
        with self._lock:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
