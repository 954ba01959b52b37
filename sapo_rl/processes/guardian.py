"""The process between this one and a worker with a user's own code, which ends whatever that code has started.

    parent -- lifeline (stdin) --> guardian -- watches --> worker -- starts --> anything

Processes that the code starts may leave their session or outlive their parent. On Linux they fall to the
guardian then (it is their subreaper), so it finds them all. It acts when the worker dies, and when the lifeline closes:
the parent does that at its end, and the kernel where it is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time
from typing import NoReturn

import psutil

from sapo_rl.processes import scratch

LOST = signal.SIGRTMAX
"""The signal by which a worker ends itself where its connection is gone; nobody else sends it."""
_PR_SET_CHILD_SUBREAPER = 36
_LIFELINE = 0  # stdin
_END_SECONDS = 5.0  # a process that does not die of SIGKILL for so long hangs in the kernel, or is another user's


def fork_guarded(connection: int) -> int:
    """Go on in a child process and leave this one behind as its guardian, which never returns from here.

    The guardian kills all that the child has started when the child dies or stdin is closed at its other end, and then
    ends in the same way as the child: by the same signal, or with the same exit code.

    Args:
        connection: descriptor that the child alone shall hold, so that its other end sees when it is closed.

    Returns:
        In the child, the process id of the guardian.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    guardian, child = os.getpid(), os.fork()
    if child:
        os.close(connection)
        _guard(child)
    os.setsid()  # a function that signals its own process group must not hit the guardian
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, _LIFELINE)
    os.close(null)
    return guardian


def kill_descendants(process: int) -> None:
    """Kill every process that descends from `process`, which lives on."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for descendant in psutil.Process(process).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                descendant.kill()


def _guard(child: int) -> NoReturn:
    bell, rung = os.pipe()
    os.set_blocking(rung, False)
    signal.set_wakeup_fd(rung)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    poll.register(_LIFELINE, 0)  # no event asked for: a hang-up is always reported
    poll.register(bell, select.POLLIN)
    status = _reap(child)
    while status is None and _LIFELINE not in dict(poll.poll()):
        os.read(bell, select.PIPE_BUF)
        status = _reap(child)
    _end_descendants()
    if status is None:
        scratch.sweep_all()  # nobody else may be left of a run that was killed
    _end_as(status or 0)


def _reap(child: int) -> int | None:
    """Collect what has died; return the wait status of `child` once it has, None before."""
    found = None
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # nothing is left
            return found or 0
        if process == child:
            found = status
        if process == 0:
            return found


def _end_descendants() -> None:
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline:
        kill_descendants(os.getpid())
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # none is left; what those that died had started would have become children of ours
            return
        time.sleep(0.01)


def _end_as(status: int) -> NoReturn:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # SIGKILL has no handler to take away
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.pause()
    os._exit(os.waitstatus_to_exitcode(status))
