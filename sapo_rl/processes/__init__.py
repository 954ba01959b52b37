"""Ties processes to those that started them, so that none outlives its run. Linux only, as vLLM is."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

PARENT = "SAPO_TRAIN_PARENT"
"""Environment variable: the process id of the parent that a rank or launcher ends with."""

DRY_RUN = "SAPO_DRY_RUN"
"""Environment variable of the processes in which a dry run tries things out: they write nothing and ask no service."""

LIMITS = ("annot allocate memory", "failed to map segment", "Too many open files", "can't start new thread")
"""What errors of a machine or user that has come to a limit say."""

MOST_FILES = 65536
"""Files and connections that a process may have open once `allow_connections` was called, if the system lets it."""

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    `parent` is the parent's process id where it is known: a parent that is gone already cannot give the signal, and
    this process then ends at once.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def is_dry_run() -> bool:
    """Return whether this process belongs to a dry run."""
    return DRY_RUN in os.environ


def begin() -> None:
    """Tie this rank or launcher to its parent; have Ctrl-C, or too tight a limit, end it without a traceback.

    It is called before the imports that take seconds: the parent may be killed meanwhile. `main` sets other handlers,
    and calls `imports_are_done`: until then no garbage is collected.
    """
    gc.disable()
    sys.excepthook = _tell_of_limits
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # held back while Python itself started
    parent = os.environ.pop(PARENT, "")
    die_with_parent(int(parent) if parent else None)


def imports_are_done() -> None:
    """Collect garbage from now on: while torch, transformers or vLLM are imported it takes a tenth of the time."""
    gc.enable()


def _tell_of_limits(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a line, and exit with 2, where memory, files or threads are limited too tightly; else the traceback."""
    if not isinstance(error, MemoryError) and not any(words in str(error) for words in LIMITS):
        sys.__excepthook__(kind, error, trace)
        return
    text = str(error).strip().splitlines()[0] if str(error).strip() else "out of memory"
    print(
        f"sapo-train: {text}; raise the limit (ulimit -v, -n, -u; the container's memory)", file=sys.stderr, flush=True
    )
    os._exit(2)


def stopping_signals() -> list[int]:
    """Return the signals that ask a run to stop; SIGHUP is none of them where it is ignored, as under `nohup`."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


def killed_by(number: int) -> str:
    """Return `was killed by SIGKILL` and where that signal comes from, for the end of a sentence."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    where = ", by kill -9 or by the kernel, out of memory (see dmesg)" if number == signal.SIGKILL else ""
    return f"was killed by {name}{where}"


def kill_group_on_hangup(fd: int) -> None:
    """Start a thread that kills this process's whole group as soon as the other end of socket `fd` is closed."""

    def watch() -> None:
        poll = select.poll()
        poll.register(fd, 0)  # no event asked for: a hang-up is always reported, data is left for the reader
        poll.poll()
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def allow_connections() -> None:
    """Let this process and those that it starts have as many connections open as the user may, not as the shell says.

    A shell's own limit is mostly 1024, fewer than the agents of a step.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Make the calls in threads of their own and return their results in order.

    Raises what the first call that failed raised, once all have ended.
    """
    with ThreadPoolExecutor(max(1, len(calls))) as pool:
        futures = [pool.submit(call) for call in calls]
    return [future.result() for future in futures]
