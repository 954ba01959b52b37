"""Groups on their way from the threads that finish them to the one that scores them."""

from __future__ import annotations

import multiprocessing
from collections import deque
from multiprocessing.connection import Connection

from sapo_rl.types import Group


class Inbox:
    """A queue whose reader can wait for it together with other connections (`multiprocessing.connection.wait`)."""

    def __init__(self) -> None:
        self._groups: deque[Group] = deque()
        self.connection: Connection
        """Readable where `take` has something to tell."""
        self.connection, self._bell = multiprocessing.Pipe(duplex=False)

    def put(self, group: Group) -> None:
        """Add a finished group; from any thread."""
        self._groups.append(group)
        self._bell.send_bytes(b".")

    def close(self) -> None:
        """Say that no more come."""
        self._bell.close()

    def take(self) -> Group | None:
        """Wait for the next group; None once the inbox is closed and empty."""
        try:
            self.connection.recv_bytes()
        except EOFError:
            self.connection.close()
            return None
        return self._groups.popleft()
