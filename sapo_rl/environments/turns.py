"""The time in which a call of an environment waits for its turn is not the call's own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar


def _nobody(begun: bool) -> None:
    """Take what is told where no pool asks."""


BEGUN: ContextVar[Callable[[bool], None]] = ContextVar("BEGUN", default=_nobody)
"""Tells the pool whether the call that is under way here has begun; its `turn_timeout` counts from then."""


@asynccontextmanager
async def in_turn(room: AbstractAsyncContextManager[None]) -> AsyncGenerator[None]:
    """Enter `room`; until that lets in, the call that waits has not begun.

    Example:
        >>> async with in_turn(asyncio.Semaphore(2)):
        ...     await work()
    """
    tell = BEGUN.get()
    tell(False)
    async with room:
        tell(True)
        yield
