"""A worker as the pool sees it: started, asked, watched, ended."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo_rl.config import EnvironmentConfig
from sapo_rl.environments.runner.worker import LONGEST_LINE
from sapo_rl.errors import UserError
from sapo_rl.errors.own_code import is_dict, readable
from sapo_rl.processes.guarded import FOREIGN, GuardedProcess

_START_SECONDS = 120.0  # until the environment is imported
_WATCH_SECONDS = 0.25


class EnvironmentFailed(Exception):
    """A call that the environment failed; the message is the cause."""


class WorkerLost(Exception):
    """The worker of an episode is gone, and with it the environment; the message is the cause."""

    def __init__(self, cause: str, suspect: bool, suspects: int) -> None:
        super().__init__(cause)
        self.suspect = suspect
        """Whether this episode's own call was under way."""
        self.suspects = suspects
        """How many episodes' were."""


@dataclass(slots=True, eq=False)
class _Asked:
    """A call under way."""

    episode: int
    answer: asyncio.Future[dict[str, Any]]
    sent: float
    begun: float | None = None
    """When the worker began it, on the monotonic clock; None too while it waits for its turn there, and later by as
    much as it has waited."""
    taken: float = 0.0
    """Seconds that it was under way before it waited."""
    waits: bool = False
    """Whether it waits for the model: that time does not count."""


class EnvironmentWorker:
    """One worker process; all of its methods belong to one event loop.

    Args:
        cfg: the environment.
        key: where it stands in the config.
        tools: dotted paths.
        variables: what it sees of the environment variables.
        log: file that takes what it prints; None leaves it to this process's stdout and stderr.
    """

    def __init__(
        self, cfg: EnvironmentConfig, key: str, tools: list[str], variables: Mapping[str, str], log: Path | None
    ) -> None:
        self.episodes = 0
        """How many are played here."""
        self.hello: dict[str, Any] = {}
        """What it tells of the environment, once it has started."""
        self.lost = ""
        """Why it is gone; empty as long as it is not."""
        self._cfg, self._key, self._tools = cfg, key, tools
        self._suspects = 0
        self._process = GuardedProcess("sapo_rl.environments.runner.worker", variables, log)
        self._asked: dict[int, _Asked] = {}
        self._numbers = itertools.count(1)
        self._heard = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []
        self._writer: asyncio.StreamWriter

    async def start(self) -> None:
        """Return once the environment is imported.

        Raises:
            UserError: it cannot be, the process died, or it took too long.
        """
        reader, self._writer = await asyncio.open_connection(sock=self._process.socket, limit=LONGEST_LINE)
        name = self._cfg.name
        self._writer.write(_line({"environment": name, "args": self._cfg.args, "tools": self._tools, "key": self._key}))
        what = f"environment '{name}'" if name else "tools"
        try:
            hello = _parsed(await asyncio.wait_for(reader.readline(), _START_SECONDS))
        except TimeoutError as error:
            raise UserError(f"{what}: importing took longer than {_START_SECONDS:g} s") from error
        if hello is None or hello.get("call") != 0:
            raise UserError(f"{what} cannot be loaded: {await asyncio.to_thread(self._process.ending)}")
        if isinstance(hello.get("failed"), str):
            raise UserError(readable(hello["failed"]))
        self.hello = hello
        self._tasks = [asyncio.create_task(self._read(reader)), asyncio.create_task(self._watch())]

    async def ask(self, episode: int, does: str, **given: Any) -> dict[str, Any]:
        """Return what the environment of an episode answers.

        Raises:
            EnvironmentFailed: its code raised, or answered what cannot be, or what it is given is too long.
            WorkerLost: the process died, or was killed because a call was late.
        """
        return await self._begin(episode, does, **given)

    def wait(self, episode: int, waits: bool) -> None:
        """Note whether an episode's agent waits for the model now: when it goes on, its time begins anew."""
        for asked in self._asked.values():
            if asked.episode == episode:
                asked.waits, asked.sent, asked.taken = waits, time.monotonic(), 0.0
                asked.begun = asked.begun and asked.sent

    def leave(self, episode: int) -> None:
        """Have the environment of an episode closed, whatever that gives."""
        if not self.lost:
            self._begin(episode, "close").cancel()

    def _begin(self, episode: int, does: str, **given: Any) -> asyncio.Future[dict[str, Any]]:
        if self.lost:
            raise WorkerLost(self.lost, suspect=False, suspects=self._suspects)
        self._process.bound_log()
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        line = _line({"call": number, "episode": episode, "do": does, **given})
        if len(line) > LONGEST_LINE:
            given_to = "row" if "row" in given else "call"
            raise EnvironmentFailed(f"{does}: its {given_to} has {len(line):,} bytes, more than {LONGEST_LINE:,}")
        self._asked[number] = _Asked(episode, answer, time.monotonic())
        self._writer.write(line)
        return answer

    async def close(self) -> None:
        """End the process and all that it started."""
        if not self.lost:
            self._lose("the environments are closed")
        self._process.hang_up()
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(AttributeError):  # it has never started
            self._writer.close()
        await asyncio.to_thread(self._process.kill)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await reader.readline()
            except ValueError:  # a line that is too long
                self._lose(FOREIGN)
                return
            except OSError:  # it ended with a call unread
                line = b""
            if not line:
                self._lose(await asyncio.to_thread(self._process.ending))
                return
            if not self._understand(_parsed(line)):
                self._lose(FOREIGN)
                return

    def _understand(self, answer: dict[str, Any] | None) -> bool:
        """Take an answer, of which nothing can be taken for granted; return whether it is one."""
        self._heard = time.monotonic()
        number = answer.get("call") if answer else None
        asked = self._asked.get(number) if type(number) is int else None
        if answer is None or asked is None:
            return False
        if isinstance(answer.get("begun"), bool):
            if answer["begun"]:
                asked.begun = self._heard - asked.taken
            elif asked.begun is not None:
                asked.begun, asked.taken = None, self._heard - asked.begun
            return True
        del self._asked[answer["call"]]
        if asked.answer.done():  # nobody waits for it
            return True
        if isinstance(answer.get("failed"), str):
            asked.answer.set_exception(EnvironmentFailed(readable(answer["failed"])))
        elif isinstance(answer.get("answer"), dict):
            asked.answer.set_result(answer["answer"])
        else:
            return False
        return True

    async def _watch(self) -> None:
        """Kill the process once a call has been under way for too long, or nothing is heard of it."""
        limit = self._cfg.turn_timeout
        while not self.lost:
            await asyncio.sleep(min(_WATCH_SECONDS, limit / 4))
            now = time.monotonic()
            asked = [one for one in self._asked.values() if not one.waits]
            late = [one for one in asked if one.begun is not None and now - one.begun > limit]
            oldest = min((one.sent for one in asked), default=now)
            if late or now - max(oldest, self._heard) > limit:
                self._lose(f"took longer than {limit:g} s ({self._key}.turn_timeout)", late or None)
                await asyncio.to_thread(self._process.kill)

    def _lose(self, cause: str, suspects: list[_Asked] | None = None) -> None:
        """Fail all calls; those that had begun are suspected where it is not known which is at fault."""
        self.lost = cause
        if suspects is None:
            suspects = [asked for asked in self._asked.values() if asked.begun is not None]
        self._suspects = len({asked.episode for asked in suspects})
        for asked in self._asked.values():
            if not asked.answer.done():
                asked.answer.set_exception(WorkerLost(cause, asked in suspects, self._suspects))
        self._asked.clear()


def _line(call: dict[str, Any]) -> bytes:
    return json.dumps(call, default=str).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if is_dict(found) else None
