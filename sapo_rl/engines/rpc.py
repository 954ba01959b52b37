"""One connection to a child process, shared by the threads that call it."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from sapo_rl.errors import EngineError


class RpcLost(Exception):
    """The child died, or did not answer in time."""

    def __init__(self, reason: str, rpc: RpcConnection) -> None:
        super().__init__(reason)
        self.rpc = rpc


class RpcTimeout(RpcLost):
    """It did not answer in time."""


class RpcConnection:
    """Multiplexes concurrent calls to the engine process over one pipe.

    It sends `(call, method, arguments)`; a reader thread routes each `(call, status, result)` to the call that waits
    for it.

    Args:
        connection: to the child; closed when the child ends.
        timeout: seconds without any message of the child after which it counts as hung.
    """

    def __init__(self, connection: Connection, timeout: float) -> None:
        self._connection = connection
        self.timeout = timeout
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._calls: dict[int, PendingCall] = {}
        self._ended = ""
        self.heard = 0.0
        """When the last message came, on the monotonic clock."""
        self.ready = PendingCall(self, 0)
        """What the child says unasked, once it can be called."""
        self._calls[0] = self.ready
        threading.Thread(target=self._read, name="engine-replies", daemon=True).start()

    def call(self) -> PendingCall:
        """Begin a call. Raises RpcLost where the child is gone."""
        with self._lock:
            if self._ended:
                raise RpcLost(self._ended, self)
            call = PendingCall(self, next(self._numbers))
            self._calls[call.number] = call
        return call

    def send(self, message: Any) -> None:
        """Send a message; from any thread. Raises RpcLost where the child does not take it."""
        try:
            with self._lock:
                self._connection.send(message)
        except OSError as error:
            raise RpcLost(f"it does not take messages ({error})", self) from error

    def idle(self) -> bool:
        """Return whether the child waits for a call."""
        return not self._calls and not self._ended

    def forget(self, number: int) -> None:
        """Drop what is still answered to this call."""
        with self._lock:
            self._calls.pop(number, None)

    def _read(self) -> None:
        """Until the child ends: a message that waits for its reader would block what the child says to others."""
        reason = "its process died"
        try:
            while True:
                number, status, result = self._connection.recv()
                self.heard = time.monotonic()
                if (call := self._calls.get(number)) is not None:  # else it was given up
                    call.answers.put((status, result))
        except (EOFError, OSError):
            pass
        except Exception as error:
            reason = f"it sent what cannot be read ({error})"
        with self._lock:
            self._ended = reason
            for call in self._calls.values():
                call.answers.put(("lost", reason))
            self._connection.close()


class PendingCall:
    """One call on a connection; several messages may belong to it, both ways."""

    def __init__(self, rpc: RpcConnection, number: int) -> None:
        self.rpc = rpc
        self.number = number
        self.answers: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def send(self, method: str, *arguments: Any) -> None:
        """Ask the child. Raises RpcLost where it does not take the message."""
        self.rpc.send((self.number, method, arguments))

    def answer(self, timeout: float | None = None) -> Any:
        """Return the next answer to this call.

        Raises:
            RpcLost: the child is gone.
            RpcTimeout: it has told nobody anything for `timeout` seconds (default: the connection's).
            EngineError: it refused the call.
        """
        timeout = self.rpc.timeout if timeout is None else timeout
        asked = time.monotonic()
        while True:
            left = max(asked, self.rpc.heard) + timeout - time.monotonic()
            try:
                status, result = self.answers.get(timeout=max(0.0, left))
                break
            except queue.Empty:
                if left <= 0:
                    raise RpcTimeout(f"no answer within {timeout:g} s", self.rpc) from None
        if status == "lost":
            raise RpcLost(result, self.rpc)
        if status == "failed":
            raise EngineError(f"vLLM refused the call:\n{result}")
        return result

    def end(self) -> None:
        """Take no more answers."""
        self.rpc.forget(self.number)
