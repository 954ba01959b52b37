"""The process in which environments run: `python -m sapo_rl.environments.runner.worker FD`, with a lifeline as stdin.

Lines of JSON go both ways. The first that comes in says which environment and tools; then each is a call of an
episode's environment, with a number that its answer has, too. Calls of coroutines are under way side by side, others
one after the other; each is told when it begins, and when it waits for its turn. A guardian
(`sapo_rl.processes.guardian`) ends what the environments have started.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from typing import Any

from sapo_rl.environments.base import Answer, Failure, Kind, Play, as_json
from sapo_rl.environments.lookup import build
from sapo_rl.environments.turns import BEGUN
from sapo_rl.errors import UserError
from sapo_rl.errors.own_code import LONGEST_FAILURE, shorten, told
from sapo_rl.processes.guarded import begin
from sapo_rl.processes.guardian import LOST

LONGEST_LINE = 1 << 24
"""Bytes of a call or an answer."""


def main() -> None:
    """Serve until the parent closes the connection or dies."""
    connection = socket.socket(fileno=begin())
    try:
        asyncio.run(Worker(connection).serve())
    except (EOFError, OSError):  # by the parent, which asks no more, or by an environment
        signal.raise_signal(LOST)


class Worker:
    """Plays the episodes that the parent has given this process.

    Args:
        connection: to the parent.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._own = connection, os.getpid()
        self._plays: dict[int, Play] = {}
        """Objects by the number of their episode."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._kind: Kind

    async def serve(self) -> None:
        """Answer calls. Raises EOFError or OSError at the end of the connection."""
        reader, self._writer = await asyncio.open_connection(sock=self._connection, limit=LONGEST_LINE)
        asked = await self._line(reader)
        try:
            self._kind = build(asked["environment"], asked["args"], asked["tools"], asked["key"])
            kind = self._kind
            hello = {"tools": kind.schemas, "steps": kind.steps, "rewards": kind.rewards, "needs": kind.needs}
            hello["runs"] = kind.runs
        except UserError as error:
            hello = {"failed": shorten(str(error), LONGEST_FAILURE)}
        except BaseException as error:  # of a class that is made to be looked at
            hello = {"failed": shorten(f"environment '{asked['environment']}': {told(error)}", LONGEST_FAILURE)}
        self._send({"call": 0, **hello})
        while True:
            call = await self._line(reader)
            task = asyncio.create_task(self._answer(call))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _line(self, reader: asyncio.StreamReader) -> dict[str, Any]:
        line = await reader.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    async def _answer(self, call: dict[str, Any]) -> None:
        number = call["call"]
        BEGUN.set(lambda begun: self._send({"call": number, "begun": begun}))
        BEGUN.get()(True)
        try:
            line = as_json({"call": number, "answer": await self._play(call)})
            if len(line) > LONGEST_LINE:
                raise Failure(f"{call['do']}: its answer has {len(line):,} bytes, more than {LONGEST_LINE:,}")
        except Failure as error:
            line = as_json({"call": number, "failed": shorten(str(error), LONGEST_FAILURE)})
        except BaseException as error:  # a property or signature of the user's that raises
            line = as_json({"call": number, "failed": shorten(told(error), LONGEST_FAILURE)})
        self._write(line)

    async def _play(self, call: dict[str, Any]) -> Answer:
        episode, does = call["episode"], call["do"]
        if does == "reset":
            play = self._plays[episode] = self._kind.begin()
            return await play.reset(call["row"], call["seed"])
        if does == "run":
            return await self._kind.begin().run(call["row"], call["seed"], call["url"], call["key"])
        if does == "step":
            return await self._plays[episode].step(call["reply"])
        if does == "use":
            return await self._plays[episode].use(call["tool"], call["arguments"])
        play = self._plays.pop(episode)
        return await (play.end(call["with_state"]) if does == "end" else play.close())

    def _send(self, answer: dict[str, Any]) -> None:
        self._write(as_json(answer))

    def _write(self, line: bytes) -> None:
        if os.getpid() != self._own:  # an environment has forked, and both return
            os._exit(0)
        self._writer.write(line)


if __name__ == "__main__":
    main()
