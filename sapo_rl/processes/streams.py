"""stdin, stdout and stderr as a run needs them: open, ready for any text, and never a reason to end it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TypeGuard

UTF8 = {"PYTHONUTF8": "1"}
"""Environment in which Python reads and writes files as UTF-8, whatever the locale."""


class _Lossy(io.FileIO):
    """A descriptor that takes everything: what it cannot pass on (the disk is full, the reader is gone) is lost."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or len(data)  # None where it would block
        except OSError:
            return len(data)


def prepare() -> None:
    """Have stdout and stderr write characters that they have no bytes for as escapes, and stderr never raise.

    Descriptors that the caller has closed lead to the null device: the next file to be opened would get their numbers.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number is this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = _lossy(1)
    elif _is_own(sys.stdout, 1):
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is None or _is_own(sys.stderr, 2):
        sys.stderr = _lossy(2, sys.stderr)


def outlive() -> None:
    """Do as `prepare` does, and let stdout lose what it cannot pass on: a run goes on where nobody reads it."""
    prepare()
    if _is_own(sys.stdout, 1):
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.stdout = _lossy(1, sys.stdout)


def _is_own(stream: Any, descriptor: int) -> TypeGuard[io.TextIOWrapper]:
    """Whether a stream is Python's own for that descriptor, and nobody's who reads what is written."""
    try:
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == descriptor
    except (OSError, ValueError):
        return False


def _lossy(descriptor: int, former: io.TextIOWrapper | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(_Lossy(descriptor, "w", closefd=False)),
        former.encoding if former else "utf-8",
        errors="backslashreplace",
        # Python's stderr writes all through to a file that does not buffer; this one does.
        line_buffering=former.line_buffering or former.write_through if former else True,
    )
