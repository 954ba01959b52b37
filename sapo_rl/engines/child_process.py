"""The process that holds vLLM: how it is born, what it prints, and how it and all that it has started end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path

from sapo_rl.engines.base import EngineSettings
from sapo_rl.engines.environment import child_environment
from sapo_rl.engines.rpc import RpcConnection
from sapo_rl.errors import UserError
from sapo_rl.processes.scratch import temporary_folder, variables

GROUP_SECONDS = 2.0


class ChildProcess:
    """One process with vLLM in it, started at once; `rpc` is the connection to it.

    The kernel kills it where this process ends first.

    Args:
        settings: of its engine; the first message that it gets.

    Raises:
        UserError: its log cannot be written.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._log_start = _begin_log(settings.log_path)
        self._files = contextlib.ExitStack()
        """Deletes the child's temporary files; vLLM leaves some behind."""
        self._ended = threading.Event()
        ours, theirs = socket.socketpair()
        # A stopped child would otherwise block a large message for ever, poll() or not.
        limit = struct.pack("ll", max(1, int(settings.timeout)), 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        with theirs:
            self._process = self._spawn(theirs.fileno())
        connection = Connection(ours.detach())
        with contextlib.suppress(OSError):  # of a child that is dead already, as `rpc` finds out
            connection.send(settings)
        self.rpc = RpcConnection(connection, settings.timeout)

    def _spawn(self, fd: int) -> subprocess.Popen[bytes]:
        """Start the process from a thread that lives as long as it does: the kernel's death signal goes by thread."""
        born: Future[subprocess.Popen[bytes]] = Future()
        command = [sys.executable, "-m", "sapo_rl.engines.vllm.child", str(fd), str(os.getpid())]
        settings, cpus = self._settings, len(os.sched_getaffinity(0))
        env = child_environment(settings.device, os.environ, cpus, settings.tensor_parallel, settings.core_process)
        env |= variables(self._files.enter_context(temporary_folder()), env)

        def keep() -> None:
            try:
                with open(settings.log_path, "ab") as log:
                    process = subprocess.Popen(
                        command,
                        env=env,
                        pass_fds=[fd],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
            except OSError as error:
                born.set_exception(error)
                return
            born.set_result(process)
            self._ended.wait()

        threading.Thread(target=keep, name="engine-parent", daemon=True).start()
        return born.result()

    def ask_to_end(self, seconds: float) -> None:
        """Have the child end by itself, if it waits for a call, and wait for that."""
        if self.rpc.idle():
            self.rpc.tell("close")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)

    def exit_code(self) -> int:
        """Return how a child that has closed its connection ended; 0 where it has not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(GROUP_SECONDS)
        return 0

    def kill(self) -> None:
        """Kill the child and what it started; the connection ends with it. More calls do nothing."""
        if not self._ended.is_set():
            self._process.kill()
            self._process.wait()
            _end_group(self._process.pid)
            self._files.close()
            self._ended.set()

    def log_tail(self, lines: int) -> list[str]:
        """Return the last lines that the child printed; none where its log was deleted."""
        with contextlib.suppress(FileNotFoundError), open(self._settings.log_path, "rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace").splitlines()[-lines:]
        return []

    def end_of_log(self) -> str:
        """Return the last lines that the child printed, under the name of the file."""
        return f"the end of {self._settings.log_path}:\n" + "\n".join(self.log_tail(25))


def _begin_log(path: Path) -> int:
    """Have a file for what the child prints, and return how much is in it already, in bytes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as log:
            return log.tell()
    except OSError as error:
        raise UserError(f"what vLLM prints cannot be written to '{path}': {error}") from error


def _end_group(group: int) -> None:
    """Kill what is left of a dead child's process group, but not before it had time to end by itself.

    Python's resource tracker is in it, which deletes the shared memory that vLLM's workers leave behind.
    """
    deadline = time.monotonic() + GROUP_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.02)
        os.killpg(group, signal.SIGKILL)
