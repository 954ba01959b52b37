"""One connection to a child process, shared by all threads: calls go out as messages, futures bring the answers."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from sapo_rl.engines.failures import refused_call
from sapo_rl.errors import EngineLost

Call = tuple[int, str, tuple[Any, ...]]
"""Its number, the method and the arguments."""
Answer = tuple[int, str, Any]
"""The call's number, `done` or `failed`, and what it returned, or the traceback."""
DIED = "its process died"


class _Open(NamedTuple):
    """A call that is not answered yet."""

    method: str
    future: Future[Any]


class RpcConnection:
    """Multiplexes concurrent calls to the engine process over one pipe.

    A message is a list of calls one way, a list of answers the other: a writer thread puts all that waits into one, a
    reader thread resolves the futures. To cancel a future tells the child to `drop` the call. A child that dies, or
    says nothing for `timeout` seconds while calls are open, is lost for good: all open futures, and those of later
    calls, fail with EngineLost.

    Args:
        connection: to the child; closed when the child ends.
        timeout: seconds without any message of the child after which it counts as hung, once it is ready.
    """

    def __init__(self, connection: Connection, timeout: float) -> None:
        self.timeout = timeout
        self.lost = ""
        """Why the child is lost; empty as long as it is not."""
        self.ready: Future[None] = Future()
        """What the child says unasked, once it can be called."""
        self._connection = connection
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._open = {0: _Open("start", self.ready)}
        self._since = 0.0
        """The last message came then, or the first of the open calls went out; on the monotonic clock."""
        self._outbox: queue.SimpleQueue[list[Call]] = queue.SimpleQueue()
        self._users = 2
        """The threads that still use the connection."""
        for name, work in (("engine-calls", self._write), ("engine-replies", self._read)):
            threading.Thread(target=work, name=name, daemon=True).start()

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Ask the child, without waiting for it; what it refuses fails the future with EngineError or UserError."""
        return self.calls(method, [arguments])[0]

    def calls(self, method: str, many: Sequence[tuple[Any, ...]]) -> list[Future[Any]]:
        """Call a method with each of the arguments. The child takes all of these calls up at once."""
        futures: dict[int, Future[Any]] = {next(self._numbers): Future() for _ in many}
        with self._lock:
            lost = self.lost
            if not lost:
                if not self._open:
                    self._since = time.monotonic()
                self._open |= {number: _Open(method, future) for number, future in futures.items()}
                self._outbox.put([(number, method, arguments) for number, arguments in zip(futures, many, strict=True)])
        for number, future in futures.items():
            if lost:
                future.set_exception(EngineLost(lost))
            else:
                future.add_done_callback(partial(self._drop, number))
        return list(futures.values())

    def tell(self, method: str) -> None:
        """Tell the child something that it does not answer."""
        self._outbox.put([(0, method, ())])

    def idle(self) -> bool:
        """Return whether the child waits for a call."""
        return not self._open and not self.lost

    def _drop(self, number: int, future: Future[Any]) -> None:
        """End a call that is open and was cancelled."""
        if future.cancelled():
            with self._lock:
                if self._open.pop(number, None) is not None:
                    self._outbox.put([(number, "drop", ())])

    def _write(self) -> None:
        """Until the child is lost: all that waits goes in one message."""
        while True:
            calls = self._outbox.get()
            while not self._outbox.empty():
                calls += self._outbox.get()
            if self.lost:
                break
            try:
                self._connection.send(calls)
            except ConnectionError:
                self._lose(DIED)
            except OSError as error:
                self._lose(f"it does not take messages ({error})")
        self._leave()

    def _read(self) -> None:
        """Until the child is lost: a message that waits for its reader would block what the child says to others."""
        try:
            while True:
                left = self._patience()
                if self._connection.poll(max(0.0, left)):
                    for answer in self._connection.recv():
                        self._resolve(*answer)
                elif left <= 0:
                    self._lose(f"no answer within {self.timeout:g} s")
                    break
        except (EOFError, OSError):
            self._lose(DIED)
        except Exception as error:
            self._lose(f"it sent what cannot be read ({error})")
        self._leave()

    def _patience(self) -> float:
        """Return for how many seconds the child may say nothing from now on."""
        with self._lock:
            waiting = self._open and self.ready.done()
            return self._since + self.timeout - time.monotonic() if waiting else self.timeout

    def _resolve(self, number: int, status: str, result: Any) -> None:
        with self._lock:
            self._since = time.monotonic()
            found = self._open.pop(number, None)
        if found is None or not found.future.set_running_or_notify_cancel():  # it was given up
            return
        if status == "failed":
            found.future.set_exception(refused_call(found.method, result))
        else:
            found.future.set_result(result)

    def _lose(self, reason: str) -> None:
        """Fail what is open. Does nothing where the child is lost already."""
        with self._lock:
            self.lost = self.lost or reason
            failed, self._open = self._open, {}
        self._outbox.put([])  # wakes the writer
        for _, future in failed.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineLost(reason))

    def _leave(self) -> None:
        """Close the connection when both threads are done with it."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._connection.close()
