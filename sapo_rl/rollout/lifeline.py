"""Ties a process to its parent, so that no engine outlives the trainer that started it. Linux only, as vLLM is."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    `parent` is the parent's process id where it is known: a parent that is gone already cannot give the signal.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def kill_group_on_hangup(fd: int) -> None:
    """Start a thread that kills this process's whole group as soon as the other end of socket `fd` is closed."""

    def watch() -> None:
        poll = select.poll()
        poll.register(fd, 0)  # no event asked for: a hang-up is always reported, data is left for the reader
        poll.poll()
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
