"""Whether vLLM's core still answers, asked by the server in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger("vllm.sapo")

BEAT_SECONDS = 5.0
"""Between two questions."""
SILENT_SECONDS = 120.0
"""A core that has answered none for so long hangs: it answers between two steps of decoding."""


class Pulse:
    """Knows when the core last answered, as long as `feel` runs."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._occupied = 0

    @property
    def lost(self) -> bool:
        """Whether the core has been silent for too long, and for no reason that is known."""
        return not self._occupied and time.monotonic() - self._last > SILENT_SECONDS

    async def feel(self, engine: Any) -> None:
        """Ask the core every few seconds, until it is dead or the task is cancelled."""
        try:
            while True:
                await engine.is_sleeping()
                self._last = time.monotonic()
                await asyncio.sleep(BEAT_SECONDS)
        except Exception as error:
            logger.warning("vLLM's core cannot be asked any more: %s", error)

    @contextlib.contextmanager
    def occupied(self) -> Iterator[None]:
        """Take silence for what it is while the core waits for the trainer."""
        self._occupied += 1
        try:
            yield
        finally:
            self._occupied -= 1
            self._last = time.monotonic()
