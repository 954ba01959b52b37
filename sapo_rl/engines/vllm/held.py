"""Which weights a rollout server holds, and the requests that are being written by them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

FOLDER = "folder/0"
"""The weight_id of the weights in the model's folder, with which a server starts."""


class OtherWeights(Exception):
    """The server does not hold the weights, is not in the group, or works for another run, than the request names."""


class HeldWeights:
    """The weights of a server and what happens to its requests when they change. For one asyncio loop.

    Requests go on while newer weights of their run are loaded. Where weights go away otherwise, or come half, what was
    being written by them is ended and refused.
    """

    def __init__(self) -> None:
        self.weight_id: str | None = FOLDER
        """None where they are half loaded."""
        self.coming: str | None = None
        """Of the weights that are being loaded."""
        self._running: set[asyncio.Task[Any]] = set()
        """The requests under way."""
        self._voided = 0
        """How often the weights went away."""
        self._news = asyncio.Condition()
        """Told of requests and loads that end."""

    @asynccontextmanager
    async def writing(self, weight_id: str) -> AsyncIterator[None]:
        """Surround a request that weights with this weight_id, or newer, are to write; wait for those that are coming.

        Raises:
            OtherWeights: the weights are others, or went away while the request was under way.
        """
        async with self._news:
            await self._news.wait_for(lambda: serves(self.weight_id, weight_id) or not serves(self.coming, weight_id))
        if not serves(self.weight_id, weight_id):
            raise OtherWeights(f"holds the weights {self.weight_id}, not {weight_id}")
        task, voided = asyncio.current_task(), self._voided
        assert task is not None
        self._running.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if voided == self._voided:  # the client has gone away
                raise
            task.uncancel()
        finally:
            self._running.discard(task)
            await self._tell()
        if voided != self._voided:
            raise OtherWeights(f"lost the weights {weight_id} meanwhile")

    @asynccontextmanager
    async def arriving(self, weight_id: str) -> AsyncIterator[None]:
        """Hold these weights once the block, which loads them, is over; none where it fails."""
        self.coming = weight_id
        try:
            yield
            self.weight_id = weight_id
        except BaseException:
            await self.give_up()
            raise
        finally:
            self.coming = None
            await self._tell()

    @property
    def salt(self) -> str:
        """Under which the cache keeps what is read and written from now on.

        Not the weight_id alone: the folder's weights come back, and what they began was gone on with by others.
        """
        return f"{self.weight_id} {self._voided}"

    async def whole(self) -> str:
        """Return the weight_id of whatever weights there are; wait where there are none."""
        async with self._news:
            await self._news.wait_for(lambda: self.weight_id is not None)
        assert self.weight_id is not None
        return self.weight_id

    async def restored(self) -> None:
        """Hold the weights of the model's folder."""
        self.weight_id = FOLDER
        await self._tell()

    async def give_up(self) -> None:
        """Hold no weights; return when all that was under way has been ended."""
        self.weight_id = None
        self._voided += 1
        for task in self._running:
            task.cancel()
        async with self._news:
            await self._news.wait_for(lambda: not self._running)

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()


def run_of(name: str) -> str:
    """Return the run that a weight_id or a meeting belongs to."""
    return name.rpartition("/")[0]


def serves(held: str | None, asked: str) -> bool:
    """Return whether weights with the weight_id `held` will do for a request: the same run's, and not older."""
    return held is not None and run_of(held) == run_of(asked) and _version(held) >= _version(asked)


def _version(weight_id: str) -> int:
    return int(weight_id.rpartition("/")[2])
