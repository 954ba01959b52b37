"""Waiting for several coroutines at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def all_of(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results in their order; where one raises the others are cancelled, and its error is raised.

    Example:
        >>> await all_of(asyncio.sleep(0.1, result=number) for number in range(3))
        [0, 1, 2]
    """
    given, tasks = [*coroutines], list[asyncio.Task[T]]()
    if len(given) == 1:
        return [await given[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks += [group.create_task(one) for one in given]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
