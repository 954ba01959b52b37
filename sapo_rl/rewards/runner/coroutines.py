"""Calls of coroutine functions in a worker, many of them under way at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from sapo_rl.errors.own_code import LONGEST_FAILURE, shorten
from sapo_rl.rewards.registry import RewardFunction
from sapo_rl.rewards.runner.scoring import ScoreError, evaluate_coroutine


class Coroutines:
    """Makes calls of coroutine functions, always in the same event loop, so that clients they keep stay usable.

    A call is acknowledged once its coroutine waits for something. The parent sends the next one only then: what it
    sends is read at once, and a function that never waits has one call under way at a time.

    Args:
        connection: where calls come from, `(number, name, arguments)`; an empty name cancels the call of that number.
        reply: sends an answer to a call.
        functions: functions with their settings by name.
    """

    def __init__(
        self,
        connection: Connection,
        reply: Callable[..., None],
        functions: Mapping[str, tuple[RewardFunction, dict[str, Any]]],
    ) -> None:
        self._connection, self._send, self._functions = connection, reply, functions
        self._runner = asyncio.Runner()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._late: set[int] = set()
        """Calls that the parent has cancelled."""
        self._end: asyncio.Future[None]

    def run(self, number: int, name: str, arguments: dict[str, list[Any]]) -> None:
        """Make a call and those that come in meanwhile; return once none is under way.

        Raises:
            EOFError: the connection is closed at its other end.
            OSError: the connection is closed here.
        """
        self._runner.run(self._serve(number, name, arguments))

    async def _serve(self, number: int, name: str, arguments: dict[str, list[Any]]) -> None:
        loop = asyncio.get_running_loop()
        self._end = loop.create_future()
        loop.add_reader(self._connection.fileno(), self._read)
        self._begin(number, name, arguments)
        await self._end

    def _read(self) -> None:
        try:
            number, name, arguments = self._connection.recv()
        except (EOFError, OSError) as error:
            self._stop(error)
            return
        if name:
            self._begin(number, name, arguments)
        elif number in self._tasks:
            self._late.add(number)
            self._tasks[number].cancel()

    def _begin(self, number: int, name: str, arguments: dict[str, list[Any]]) -> None:
        loop = asyncio.get_running_loop()
        self._tasks[number] = loop.create_task(self._call(number, name, arguments))
        loop.call_soon(self._acknowledge, number)  # after the coroutine's first step

    def _acknowledge(self, number: int) -> None:
        if number in self._tasks:
            self._reply(number, under_way=True)

    async def _call(self, number: int, name: str, arguments: dict[str, list[Any]]) -> None:
        function, settings = self._functions[name]
        try:
            answer = {"scores": await evaluate_coroutine(function, arguments, settings)}
        except ScoreError as error:
            answer = {"failed": shorten(str(error), LONGEST_FAILURE)}
        if number in self._late:
            self._late.remove(number)
            answer = {"late": True}
        del self._tasks[number]
        self._reply(number, **answer)
        if not self._tasks:
            self._stop()  # with the last answer, after which the parent may send another function's call

    def _reply(self, number: int, **answer: Any) -> None:
        try:
            self._send(number, **answer)
        except OSError as error:
            self._stop(error)

    def _stop(self, error: BaseException | None = None) -> None:
        if self._end.done():
            return
        asyncio.get_running_loop().remove_reader(self._connection.fileno())
        if error is None:
            self._end.set_result(None)
        else:
            self._end.set_exception(error)
