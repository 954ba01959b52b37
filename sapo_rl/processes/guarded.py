"""A process that runs a user's own code behind a guardian: how it is started, ended, and how it begins."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from sapo_rl.processes import die_with_parent, streams
from sapo_rl.processes.guardian import LOST, fork_guarded, kill_descendants

FOREIGN = "it wrote to a file descriptor that is not its own, or closed it, or changed the module json"
"""What has happened where its answers are none."""
_STATUS_SECONDS = 2.0  # from the end of the connection to that of the process, where both end together
_END_SECONDS = 10.0  # for the guardian to end everything
_LONGEST_LOG = 1 << 26  # bytes; begun anew then


class GuardedProcess:
    """A Python module that runs in a process of its own, with a socket to this one.

    Args:
        module: run as `python -m module FD`; it calls `begin`.
        environment: the variables that it sees.
        log: file that takes what it prints; None leaves it to this process's stdout and stderr.
    """

    def __init__(self, module: str, environment: Mapping[str, str], log: Path | None) -> None:
        self.socket: socket.socket
        """This end, for whoever talks to the process; closing it is up to him."""
        self._log = log
        self.socket, theirs = socket.socketpair()
        with theirs, open(log or os.devnull, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.PIPE,  # the guardian's lifeline
                stdout=output if log else None,
                stderr=output if log else None,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C on the terminal reaches only this process
            )

    def bound_log(self) -> None:
        """Begin the log anew where it has become too long."""
        if self._log is not None:
            with contextlib.suppress(OSError):  # somebody has deleted it
                if self._log.stat().st_size > _LONGEST_LOG:
                    os.truncate(self._log, 0)

    def hang_up(self) -> None:
        """Have the process end, with all that it started; `kill` waits for it."""
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

    def ending(self) -> str:
        """Say how the process ended; one that has closed the connection may live on."""
        try:
            code = self._process.wait(_STATUS_SECONDS)
        except subprocess.TimeoutExpired:
            return FOREIGN
        if code == -LOST:
            return FOREIGN
        printed = f"; what it printed: {self._log}" if self._log is not None else ""
        if code >= 0:
            return f"its process ended with exit code {code}{printed}"
        return f"its process ended by signal {-code} ({signal.strsignal(-code)}){printed}"


def begin() -> int:
    """Go on in a child of this process, which becomes its guardian; return the descriptor of the socket."""
    descriptor = int(sys.argv[1])
    die_with_parent(fork_guarded(descriptor))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # one from outside is not the code's KeyboardInterrupt
    os.set_inheritable(descriptor, False)
    streams.outlive()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            line_buffering=True
        )  # the process is killed at its end: what it holds back would be lost
    return descriptor
