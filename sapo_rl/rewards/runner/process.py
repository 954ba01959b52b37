"""A worker as the pool sees it: started, given calls, read, ended."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Collection, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

from sapo_rl.config import RewardConfig
from sapo_rl.errors.own_code import readable
from sapo_rl.processes.guarded import FOREIGN, GuardedProcess
from sapo_rl.rewards.runner.blame import Call, Outcome
from sapo_rl.rewards.runner.scoring import call_arguments
from sapo_rl.rewards.runner.under_way import Task, UnderWay

_CHUNK = 1 << 20  # bytes read at once, more than most answers have
_LONGEST_ANSWER = 1 << 24  # bytes; 16384 samples, the most of a group, take 400 kB
_BOOT_SECONDS = 60.0  # until a worker begins to import
_SEND_SECONDS = 5  # that a worker may read nothing of what it is sent
_CANCEL_SECONDS = 2.0  # from the cancellation of a call to its end

End: TypeAlias = tuple[Call | None, Outcome]
"""A call that has ended, None for the start of a worker, and how."""


class WorkerProcess:
    """One worker process, and what it is doing.

    Args:
        cfg: whose functions it runs; `start_timeout` bounds the import of each.
        environment: the variables that it sees.
        log: file that takes what functions print; None leaves it to this process's stdout and stderr.
        retried: whether it stands in for one that died or hung while it started.
    """

    def __init__(
        self, cfg: RewardConfig, environment: Mapping[str, str], log: Path | None, retried: bool = False
    ) -> None:
        self.ready = False
        """Whether it has imported all functions."""
        self.needs: dict[str, list[str]] = {}
        """Columns without which a function cannot be called, by the function's name; known once it is ready."""
        self.under_way = UnderWay(cfg.functions)
        """The calls that it is at; knows which functions are coroutine functions once it is ready."""
        self.retried = retried
        self._cfg = cfg
        self._loading = ""
        self._start_deadline = time.monotonic() + max(cfg.start_timeout, _BOOT_SECONDS)
        self._read = b""
        self._process = GuardedProcess("sapo_rl.rewards.runner.worker", environment, log)
        # A worker that was stopped reads nothing, and the pool must not wait for that without end.
        self._process.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_SECONDS, 0))
        self.connection = Connection(self._process.socket.detach())
        with contextlib.suppress(OSError):  # it is dead already: `receive` tells how
            self.connection.send({name: (f.function, f.args, f.style) for name, f in cfg.functions.items()})

    @property
    def busy(self) -> bool:
        """Whether an answer is expected."""
        return bool(self.under_way.calls) or not self.ready

    @property
    def deadline(self) -> float:
        """When the first answer that is waited for counts as late, on the monotonic clock."""
        return self.under_way.deadline if self.ready else self._start_deadline

    def room(self) -> Collection[str]:
        """Return the names of the functions of which it can take another call now."""
        return self.under_way.room() if self.ready else ()

    def send(self, call: Call, limit: float) -> None:
        """Start a call that has `limit` seconds.

        Raises:
            OSError: the process is dead, or does not read; the call has not begun.
        """
        self._process.bound_log()
        number = self.under_way.add(Task(call, limit, time.monotonic() + limit))
        try:
            self.connection.send((number, call.name, call_arguments(call.places)))
        except OSError:
            self.under_way.remove(number)
            raise

    def receive(self) -> list[End]:
        """Read what is waiting; return which calls have ended by it, and how, or that the start has failed."""
        try:
            found = os.read(self.connection.fileno(), _CHUNK)
        except OSError:
            found = b""
        calls = self.under_way.calls
        if not found:
            return self._dead(self._process.ending(), calls)
        self._read += found
        if not found.endswith(b"\n") and len(self._read) < _LONGEST_ANSWER:
            return []
        lines, self._read = self._read.splitlines(), b""
        ends: list[End] = []
        for line in lines:
            understood = self._understand(line)
            if understood is None:
                return self._dead(FOREIGN, calls)
            ends += understood
        return ends

    def overdue(self) -> list[End]:
        """Cancel the calls that take longer than they may; return what has ended where that does not help.

        Only calls of coroutine functions can be cancelled, and have a moment to end then.
        """
        if not self.ready:
            limit = f"{self._cfg.start_timeout:g} s"
            return self._dead(f"took longer than {limit}; reward.start_timeout sets how long it may", [])
        now = time.monotonic()
        late = self.under_way.late(now)
        stuck = [task for task in late.values() if task.cancelled or task.call.name not in self.under_way.coroutines]
        if stuck:
            return self._dead(stuck[0].cause, self.under_way.calls, late=True)
        for number, task in late.items():
            task.cancelled, task.deadline = True, now + _CANCEL_SECONDS
            with contextlib.suppress(OSError):  # it is dead, which `receive` tells, or stuck
                self.connection.send((number, "", None))
        return []

    def hang_up(self) -> None:
        """Have the process end, with all that it started; `kill` waits for it."""
        self.connection.close()
        self._process.hang_up()

    def kill(self) -> None:
        """End the process and all that it started."""
        self.connection.close()
        self._process.kill()

    def _understand(self, line: bytes) -> list[End] | None:
        """Check one answer, of which nothing can be taken for granted; None where it is none."""
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(answer, dict):
            return None
        if not self.ready:
            return self._understand_start(answer)
        found = self.under_way.understand(answer)
        return None if found is None else [*found]

    def _understand_start(self, answer: dict[str, Any]) -> list[End] | None:
        if answer.get("call") != 0:
            return None
        if isinstance(answer.get("failed"), str):
            return [(None, Outcome(None, readable(answer["failed"])))]
        if (name := str(answer.get("loading"))) in self._cfg.functions:
            self._loading, self._start_deadline = name, time.monotonic() + self._cfg.start_timeout
            return []
        needs = _as_columns(answer.get("needs"))
        coroutines = _as_columns({"coroutines": answer.get("coroutines")})
        if needs is None or coroutines is None:
            return None
        self.under_way.coroutines = {*coroutines["coroutines"]} & self._cfg.functions.keys()
        self.needs, self.ready = needs, True
        return []

    def _dead(self, cause: str, calls: list[Call], late: bool = False) -> list[End]:
        """Return how `calls`, or the start, end by the end of the process."""
        self.under_way.clear()
        if not self.ready:
            return [(None, Outcome(None, self._while_loading(cause), dead=True, late=late))]
        return [(call, Outcome(None, cause, dead=True, late=late, shared=len(calls) > 1)) for call in calls]

    def _while_loading(self, cause: str) -> str:
        if self.ready or not self._loading:
            return cause
        return f"importing '{self._cfg.functions[self._loading].function}' for '{self._loading}': {cause}"


def _as_columns(found: Any) -> dict[str, list[str]] | None:
    """Return what a worker answered as lists of text by name; None where it is anything else."""
    if not isinstance(found, dict) or not all(isinstance(names, list) for names in found.values()):
        return None
    return found if all(isinstance(name, str) for names in found.values() for name in names) else None
