"""Where the time of a step goes: `with timers("rollout"): ...`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ASIDE = ("eval",)
"""Phases that are timed, but are no part of a step."""


class Timers:
    """Adds up wall-clock seconds by phase.

    The clock of the steps starts with the first phase and never stops, so that a step's time holds everything, what
    is in no phase included, except the phases in `ASIDE`.

    Args:
        synchronize: waits for the device, e.g. `torch.cuda.synchronize`; called at both ends of a phase, so that
            queued work counts for the phase that queued it.
    """

    def __init__(self, synchronize: Callable[[], object] | None = None) -> None:
        self._synchronize = synchronize or (lambda: None)
        self._seconds: dict[str, float] = {}
        self._since: float | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the body of a `with`, one that raises included; a phase may occur several times in a step."""
        self._synchronize()
        start = time.perf_counter()
        self._since = start if self._since is None else self._since
        try:
            yield
            self._synchronize()
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return `time/<phase>` for each phase since the last call, and `time/step`, all in seconds; begin anew."""
        now = time.perf_counter()
        elapsed = now - (now if self._since is None else self._since)
        aside = sum(self._seconds.get(phase, 0.0) for phase in ASIDE)
        taken = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds, self._since = {}, now
        return taken | {"time/step": elapsed - aside}
