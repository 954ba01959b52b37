"""Environments in worker processes: an episode takes a seat in one of them.

An environment is user code that hears a model's words: it may hang in C, exhaust memory or end its process. So it runs
in workers that are replaced when they die and killed when a call is late.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncGenerator, Collection, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sapo_rl.config import Config
from sapo_rl.environments.registry import ROW_CHECKS
from sapo_rl.environments.runner.process import EnvironmentFailed, EnvironmentWorker
from sapo_rl.errors import UserError, did_you_mean
from sapo_rl.errors.files import touch_log
from sapo_rl.errors.own_code import is_dict
from sapo_rl.processes.hidden import environment_of, hidden, with_hint
from sapo_rl.types import LARGEST_REWARD


class Step(NamedTuple):
    """What an environment says to a reply."""

    messages: list[dict[str, Any]]
    reward: float
    done: bool
    info: dict[str, Any]


class Used(NamedTuple):
    """What a tool says when the model calls it."""

    text: str
    failed: bool
    """Whether the call was in vain, which `text` explains to the model."""
    done: bool
    """Whether the environment is over by it."""


class Ended(NamedTuple):
    """What an environment says at the end of its episode."""

    reward: float | None
    """What `get_reward` says, of several the sum; None where there is none."""
    parts: dict[str, float]
    """The several, by name."""
    state: dict[str, Any] | None
    """The environment's own, where asked for."""


class EnvironmentPool:
    """Keeps as many processes as its `workers` says, and seats episodes in the one that has the fewest.

    Whatever environments have started ends with the pool, also where this process is killed. All methods belong to one
    event loop.

    Args:
        config: the environment, the tools, and which secrets they see.
        chosen: which of `config.played`.
        log: file that takes what they print, bounded; None leaves it to this process's stdout and stderr.
        workers: how many processes; None takes as many as its config says.
    """

    def __init__(self, config: Config, chosen: str = "", log: Path | None = None, workers: int | None = None) -> None:
        self.cfg = config.played[chosen]
        """The environment."""
        self.key = f"environments.{chosen}" if chosen else "environment"
        """Where it stands in the config."""
        self.named = f"environment '{name}'" if (name := self.cfg.name or chosen) else "a tool"
        """What it is called in messages."""
        self.schemas: list[dict[str, Any]] = []
        """What the model is told of the tools, as OpenAI's API has it; known once the pool is open."""
        self.steps = False
        """Whether the environment answers each reply itself."""
        self.runs = False
        """Whether it is an agent that asks the model by itself."""
        self._tools, self._log, self._size = config.tools, log, workers or self.cfg.workers
        self._hidden = hidden(os.environ, config.reward.env)
        self._functions = config.reward.functions
        self._workers: list[EnvironmentWorker] = []
        self._needs: list[str] = []
        self._numbers = itertools.count()
        self._opening = asyncio.Lock()
        self._single: set[EnvironmentWorker] = set()
        self._apart = asyncio.Semaphore(self._size)

    async def open(self) -> None:
        """Start all workers, and wait until they have imported the environment.

        Raises:
            UserError: it cannot be imported, is of neither shape, or does not suit its arguments.
        """
        touch_log(self._log, "environments")
        await self._fill()
        hello = self._workers[0].hello
        self.schemas, self.steps, self._needs = hello["tools"], hello["steps"], hello["needs"]
        self.runs = hello["runs"]
        if not hello["rewards"] and not self._functions:
            raise UserError(f"{self.named} gives no reward; name one, e.g. with reward=numeric")

    async def look(self) -> None:
        """Open and close, so that what the environment is like is known. Raises UserError as `open` does."""
        try:
            await self.open()
        finally:
            await self.close()

    def check_columns(self, row: Mapping[str, Any], source: str) -> None:
        """Refuse a row with which no episode can begin; all have its columns.

        Args:
            row: by column; what is None belongs to another environment.
            source: whose it is, for the message.

        Raises:
            UserError: a column is missing, or a built-in environment cannot use what is in it.
        """
        for column in self._needs:
            if column not in row:
                raise UserError(
                    f"{self.named} needs '{column}', which is no column of {source}; {did_you_mean(column, row)}"
                )
        if self.cfg.name in ROW_CHECKS and all(row[column] is not None for column in self._needs):
            try:
                ROW_CHECKS[self.cfg.name](row)
            except ValueError as error:
                raise UserError(f"{self.named} cannot begin with the first row of {source}: {error}") from error

    async def seat(self) -> Seat:
        """Return a place for one episode."""
        async with self._opening:
            await self._fill()
        worker = min(self._workers, key=lambda one: one.episodes)
        return Seat(worker, next(self._numbers), self._hidden)

    @contextlib.asynccontextmanager
    async def apart(self) -> AsyncGenerator[Seat]:
        """Give one episode a process of its own, as many at once as there are `workers`."""
        async with self._apart:
            worker = self._worker()
            self._single.add(worker)
            try:
                await self._start([worker])
                async with Seat(worker, next(self._numbers), self._hidden) as seat:
                    yield seat
            finally:
                await worker.close()
                self._single.discard(worker)

    async def close(self) -> None:
        """End all workers."""
        workers, self._workers, self._single = [*self._workers, *self._single], [], set()
        await asyncio.gather(*(worker.close() for worker in workers))

    async def _fill(self) -> None:
        """Start a worker in the place of each that is lost."""
        lost = [worker for worker in self._workers if worker.lost]
        self._workers = [worker for worker in self._workers if not worker.lost]
        missing = self._size - len(self._workers)
        if not missing:
            return
        new = [self._worker() for _ in range(missing)]
        self._workers += new
        await asyncio.gather(*(worker.close() for worker in lost))
        await self._start(new)

    def _worker(self) -> EnvironmentWorker:
        return EnvironmentWorker(self.cfg, self.key, self._tools, environment_of(self._hidden), self._log)

    async def _start(self, workers: list[EnvironmentWorker]) -> None:
        """Return when they have imported the environment."""
        try:
            await asyncio.gather(*(worker.start() for worker in workers))
        except UserError as error:
            raise UserError(with_hint(str(error), self._hidden)) from error


def pools_of(config: Config, log: Path | None = None) -> dict[str, EnvironmentPool]:
    """Return a pool for each of `config.played`, by the same names; `log` takes what is printed in all of them."""
    return {name: EnvironmentPool(config, name, log) for name in config.played}


class Seat:
    """One episode's place in a worker, and the clock of what its environment takes; a context manager.

    Every call raises EnvironmentFailed where the environment's code does or answers what cannot be, and WorkerLost
    where its process is gone.
    """

    def __init__(self, worker: EnvironmentWorker, number: int, secrets: Collection[str]) -> None:
        self.seconds = 0.0
        """What its calls took so far, waiting included."""
        self._worker, self._number, self._secrets = worker, number, secrets
        self._waits, self._since = 0, 0.0
        self._open = False

    async def __aenter__(self) -> Seat:
        """Take it."""
        self._worker.episodes += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        """Leave it; an environment that has not ended is closed, whatever that gives."""
        self._worker.episodes -= 1
        if self._open:
            self._worker.leave(self._number)

    async def reset(self, row: dict[str, Any], seed: int) -> str | list[dict[str, Any]] | None:
        """Begin; return messages that follow the prompt, or text to add to its end."""
        self._open = True
        return (await self._ask("reset", row=row, seed=seed)).get("opening")

    async def step(self, reply: str) -> Step:
        """Return what the environment says to a reply."""
        found = await self._ask("step", reply=reply)
        messages, info = found.get("messages"), found.get("info")
        return Step(
            messages if isinstance(messages, list) else [],
            _as_number(found.get("reward")),
            found.get("done") is True,
            info if isinstance(info, dict) else {"info": info},
        )

    async def use(self, tool: str, arguments: dict[str, Any]) -> Used:
        """Return what a tool says when the model calls it."""
        found = await self._ask("use", tool=tool, arguments=arguments)
        return Used(str(found.get("text")), found.get("failed") is True, found.get("done") is True)

    async def run(self, row: dict[str, Any], seed: int, url: str, key: str) -> float:
        """Have an agent play the whole episode, asking the model at `url` with `key`; return its reward."""
        return _as_number((await self._ask("run", row=row, seed=seed, url=url, key=key)).get("reward"))

    @contextlib.contextmanager
    def waiting(self) -> Generator[None]:
        """Count the time inside for the model's, not the agent's; several may be inside at once."""
        self._waits += 1
        if self._waits == 1:
            self._since = time.perf_counter()
            self._worker.wait(self._number, True)
        try:
            yield
        finally:
            self._waits -= 1
            if not self._waits:
                self.seconds -= time.perf_counter() - self._since
                self._worker.wait(self._number, False)

    async def end(self, with_state: bool = False) -> Ended:
        """End; return the reward, and the environment's state where asked for."""
        answer = await self._ask("end", with_state=with_state)
        self._open = False
        state = answer.get("state")
        reward, parts = answer.get("reward"), answer.get("parts")
        return Ended(
            None if reward is None else _as_number(reward),
            {name: _as_number(part) for name, part in parts.items()} if is_dict(parts) else {},
            state if is_dict(state) else None,
        )

    async def _ask(self, does: str, **given: Any) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            return await self._worker.ask(self._number, does, **given)
        except EnvironmentFailed as error:
            raise EnvironmentFailed(with_hint(str(error), self._secrets)) from error
        finally:
            self.seconds += time.perf_counter() - start


def _as_number(found: Any) -> float:
    """A reward as a worker answered it, of which nothing can be taken for granted."""
    if type(found) not in (int, float) or not abs(found) <= LARGEST_REWARD:
        raise EnvironmentFailed(f"its process answered {str(found)[:60]!r} for a reward")
    return float(found)
