"""A program to run, what bounds it, and how it ended."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

_FILES = 64  # open at once
MEGABYTE = 1 << 20


class SandboxMissing(ValueError):
    """Programs cannot be isolated in this way, or not on this machine; the message says why, and what helps."""


@dataclass(frozen=True)
class Limits:
    """Bounds on one run of a program.

    Example:
        >>> Limits(cpu_seconds=2).memory_mb
        512
    """

    cpu_seconds: int = 5
    """Of computing; then it is killed."""
    seconds: float = 10.0
    """Of wall-clock time, from its first line on; then it is killed."""
    memory_mb: int = 512
    """Of its address space, in units of 2^20 bytes."""
    output_bytes: int = 1 << 16
    """Of stdout and stderr each; a program that prints more is killed."""
    disk_mb: int = 16
    """Of files that it writes, in units of 2^20 bytes."""

    @classmethod
    def of(cls, cpu_seconds: int, memory_mb: int) -> Limits:
        """Return limits with three seconds on the clock for each of computing, as programs wait for each other.

        Raises:
            ValueError: numbers with which no program runs.
        """
        if cpu_seconds < 1 or memory_mb < 64:
            raise ValueError(f"needs cpu_seconds >= 1 and memory_mb >= 64, got {cpu_seconds} and {memory_mb}")
        return cls(cpu_seconds, 3.0 * cpu_seconds, memory_mb)


@dataclass(frozen=True)
class Job:
    """A program, and what is asked of it once it has run.

    Example:
        >>> Job("def double(x): return 2 * x", checks=["assert double(2) == 4"])
        >>> Job("print(int(input()) + 1)", stdin="41")
        >>> Job("def double(x): return 2 * x", function="double", calls=[[2], [3]])
    """

    program: str
    """Python's source."""
    setup: str = ""
    """What runs before it; a program that does not compile alone, as a function's body, goes on where this ends."""
    stdin: str = ""
    """What it reads."""
    checks: Sequence[str] = ()
    """Statements that run in its names; one that raises has failed."""
    function: str = ""
    """A function of it, or a method of its class `Solution`, for `calls`."""
    calls: Sequence[list[Any]] = ()
    """Arguments of each call, as JSON knows them."""


@dataclass(frozen=True)
class Result:
    """How a run has ended."""

    exit_code: int
    """The program's, or 128 and the number of the signal that ended it, as shells have it."""
    stdout: str
    """What it printed, at most `Limits.output_bytes`."""
    stderr: str
    """Likewise, with the traceback of an error."""
    stopped: Literal["", "seconds", "output"] = ""
    """The limit for which it was killed from outside; empty where it ended by itself, or by the kernel."""
    reports: list[dict[str, Any]] = field(default_factory=list)
    """One for each check (`passed`, `error`) or call (`value`, or `error`), as far as it came.

    They come from the program's process: one that looks for what it is asked can make up its own.
    """
    seconds: float = field(default=0.0, compare=False)
    """On the clock, from the program's first line to its end."""


def task_of(job: Job, limits: Limits, key: str) -> dict[str, Any]:
    """Return what `inside.py` is told; what it reports has the key."""
    bounds = {
        "memory": limits.memory_mb * MEGABYTE,
        "seconds": limits.cpu_seconds,
        "file": limits.disk_mb * MEGABYTE,
        "files": _FILES,
    }
    rest = {
        "setup": job.setup,
        "program": job.program,
        "checks": [*job.checks],
        "function": job.function,
        "calls": [*job.calls],
    }
    return {"key": key, "limits": bounds, **rest}


def by_key(lines: Iterable[bytes], key: str) -> list[dict[str, Any]]:
    """Return what `inside.py` has told, which knows the key, out of what a program may have written too."""
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            told = json.loads(line)
            if isinstance(told, dict) and told.pop("key", None) == key:
                found.append(told)
    return found
