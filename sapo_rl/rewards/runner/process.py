"""A worker as the pool sees it: started, given calls, read, ended."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sapo_rl.config import RewardConfig
from sapo_rl.rewards.runner.blame import Call, Outcome
from sapo_rl.rewards.runner.guardian import LOST, kill_descendants
from sapo_rl.rewards.runner.scoring import LARGEST, call_arguments, readable

_CHUNK = 1 << 20  # bytes read at once, more than most answers have
_LONGEST_ANSWER = 1 << 24  # bytes; 16384 samples, the most of a group, take 400 kB
_BOOT_SECONDS = 60.0  # until a worker begins to import
_SEND_SECONDS = 5  # that a worker may read nothing of what it is sent
_STATUS_SECONDS = 2.0  # from the end of the connection to that of the process, where both end together
_END_SECONDS = 10.0  # for the guardian to end everything
_LONGEST_LOG = 1 << 26  # bytes; begun anew then
_FOREIGN = "it wrote to a file descriptor that is not its own, or closed it, or changed the module json"


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
        self.task: Call | None = None
        """The call that it is at."""
        self.retried = retried
        self._cfg = cfg
        self._log = log
        self._loading = ""
        self._limit = cfg.start_timeout
        self.deadline = time.monotonic() + max(self._limit, _BOOT_SECONDS)
        """When the answer that is waited for counts as late, on the monotonic clock."""
        self._number = 0
        """Number of the call that is answered next; loading the functions is the first."""
        self._read = b""
        ours, theirs = socket.socketpair()
        # A worker that was stopped reads nothing, and the pool must not wait for that without end.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_SECONDS, 0))
        self.connection = Connection(ours.detach())
        with theirs, open(log or os.devnull, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sapo_rl.rewards.runner.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.PIPE,  # the guardian's lifeline
                stdout=output if log else None,
                stderr=output if log else None,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C on the terminal reaches only this process
            )
        with contextlib.suppress(OSError):  # it is dead already: `receive` tells how
            self.connection.send({name: (f.function, f.args) for name, f in cfg.functions.items()})

    @property
    def busy(self) -> bool:
        """Whether an answer is expected."""
        return self.task is not None or not self.ready

    def send(self, task: Call, limit: float) -> None:
        """Start a call that has `limit` seconds.

        Raises:
            OSError: the process is dead, or does not read.
        """
        if self._log is not None:
            with contextlib.suppress(OSError):  # somebody has deleted it
                if self._log.stat().st_size > _LONGEST_LOG:
                    os.truncate(self._log, 0)
        self._number += 1
        self.connection.send((self._number, task.name, call_arguments(task.group, task.positions)))
        self.task, self._limit, self.deadline = task, limit, time.monotonic() + limit

    def receive(self) -> Outcome | None:
        """Read what is waiting; return how the call, or the start, has ended, or None where it goes on.

        A start that succeeds has no outcome: the worker is `ready` then.
        """
        try:
            found = os.read(self.connection.fileno(), _CHUNK)
        except OSError:
            found = b""
        if not found:
            return Outcome(None, self._while_loading(self._end()), dead=True)
        self._read += found
        if not found.endswith(b"\n") and len(self._read) < _LONGEST_ANSWER:
            return None
        lines, self._read = self._read.splitlines(), b""
        outcome = None
        for line in lines:  # several only while it starts
            outcome = self._understand(line) if outcome is None else Outcome(None, _FOREIGN, dead=True)
        return outcome

    def late(self) -> Outcome:
        """Return the outcome of a call, or of a start, that took longer than it may."""
        if self.ready:
            return Outcome(None, f"took longer than {self._limit:g} s", dead=True, late=True)
        cause = self._while_loading(f"took longer than {self._limit:g} s; reward.start_timeout sets how long it may")
        return Outcome(None, cause, dead=True, late=True)

    def hang_up(self) -> None:
        """Have the process end, with all that it started; `kill` waits for it."""
        self.connection.close()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def kill(self) -> None:
        """End the process and all that it started."""
        self.hang_up()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:  # somebody has stopped the guardian
            kill_descendants(self._process.pid)
            self._process.kill()
            self._process.wait()

    def _understand(self, line: bytes) -> Outcome | None:
        """Check one answer, of which nothing can be taken for granted."""
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if isinstance(answer, dict) and answer.get("call") == self._number:
            if isinstance(answer.get("failed"), str):
                return Outcome(None, readable(answer["failed"]))
            if not self.ready and (name := str(answer.get("loading"))) in self._cfg.functions:
                self._loading, self.deadline = name, time.monotonic() + self._limit
                return None
            if not self.ready and (needs := _as_columns(answer.get("needs"))) is not None:
                self.needs, self.ready, self.deadline = needs, True, math.inf
                return None
            scores = _as_scores(answer.get("scores"), len(self.task.positions) if self.task else 0)
            if self.ready and scores is not None:
                return Outcome(scores)
        return Outcome(None, self._while_loading(_FOREIGN), dead=True)

    def _while_loading(self, cause: str) -> str:
        if self.ready or not self._loading:
            return cause
        return f"importing '{self._cfg.functions[self._loading].function}' for '{self._loading}': {cause}"

    def _end(self) -> str:
        """Say how the process ended; one that has closed the connection may live on."""
        try:
            code = self._process.wait(_STATUS_SECONDS)
        except subprocess.TimeoutExpired:
            return _FOREIGN
        if code == -LOST:
            return _FOREIGN
        printed = f"; what it printed: {self._log}" if self._log is not None else ""
        if code >= 0:
            return f"its process ended with exit code {code}{printed}"
        return f"its process ended by signal {-code} ({signal.strsignal(-code)}){printed}"


def _as_scores(found: Any, count: int) -> list[float | None] | None:
    """Return what a worker answered as `count` scores; None where it is anything else."""
    if not isinstance(found, list) or len(found) != count:
        return None
    if not all(one is None or (type(one) in (int, float) and abs(one) <= LARGEST) for one in found):
        return None
    return [None if one is None else float(one) for one in found]


def _as_columns(found: Any) -> dict[str, list[str]] | None:
    """Return what a worker answered as lists of text by name; None where it is anything else."""
    if not isinstance(found, dict) or not all(isinstance(names, list) for names in found.values()):
        return None
    return found if all(isinstance(name, str) for names in found.values() for name in names) else None
