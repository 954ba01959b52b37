"""What runs inside the sandbox: limits itself, then runs a program and what is asked of it.

It is handed over compiled, and imports little of the standard library: both would take as long as a small program. It
gets a job, by marshal, and a descriptor, which takes a line of JSON at the start and for each check or call. Stdin,
stdout and stderr are the program's. Between its checks and calls nothing is imported: it may have left no file to open.
"""

from __future__ import annotations

import builtins
import marshal
import os
import resource
import sys

TYPE_CHECKING = False  # as in `typing`, whose import would take a tenth of the time of a small program
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, BinaryIO

_NAME = "program.py"
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2


def main(task: BinaryIO, report: int) -> None:
    """Run the job that is read from there and exit as the program does."""
    with task:
        job = marshal.load(task)
    _limit(**job["limits"])
    if job["forbidden"]:
        _forbid(job["forbidden"])
    _do(job, lambda told: os.write(report, told))


def serve(job: dict[str, Any]) -> None:
    """Run the job where a service isolates it: reports go to stdout, each on a line of its own."""
    _limit(**job["limits"])
    report = os.dup(1)
    _do(job, lambda told: os.write(report, b"\n" + told))


def _do(job: dict[str, Any], write: Callable[[bytes], object]) -> None:
    sys.argv[:] = [_NAME]

    def tell(**found: str) -> None:
        told = {"key": f'"{job["key"]}"', **found}
        write(b"{%s}\n" % ", ".join(f'"{name}": {value}' for name, value in told.items()).encode())

    if job["calls"]:
        import json  # noqa: F401  # for `_call`
    tell(started="true")
    namespace = _run(_joined(job["setup"], job["program"]))
    for check in job["checks"]:
        tell(**_check(check, namespace))
    for arguments in job["calls"]:
        tell(**_call(job["function"], arguments, namespace))


def _joined(setup: str, program: str) -> str:
    """The program after its setup; with a body alone they are one text."""
    if not setup:
        return program
    try:
        compile(program, _NAME, "exec", dont_inherit=True)
    except Exception:
        return setup + program
    return f"{setup}\n{program}"


def _run(program: str) -> dict[str, Any]:
    """Run a program as Python runs a file; return its names. An error ends this process, as it ends a program."""
    namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
    try:
        exec(compile(program, _NAME, "exec", dont_inherit=True), namespace)
    except SystemExit:
        raise
    except BaseException as error:
        _print(error, program)
        sys.exit(1)
    return namespace


def _print(error: BaseException, program: str) -> None:
    """Print an error as Python does, without the lines of this file."""
    import linecache  # not for a program that ends well: they take as long as all the others
    import traceback

    linecache.cache[_NAME] = (len(program), None, program.splitlines(keepends=True), _NAME)
    trace = error.__traceback__
    traceback.print_exception(type(error), error, trace and trace.tb_next)


def _check(check: str, namespace: dict[str, Any]) -> dict[str, str]:
    """Run a test, which fails by raising."""
    try:
        exec(compile(check, "test", "exec", dont_inherit=True), namespace)
    except BaseException as error:
        return {"passed": "false", "error": _told(error)}
    return {"passed": "true"}


def _call(name: str, arguments: list[Any], namespace: dict[str, Any]) -> dict[str, str]:
    """Call a function of the program, or a method of its class `Solution`; what it returned."""
    import json  # is there already

    try:
        owner = namespace["Solution"]() if name not in namespace and "Solution" in namespace else None
        function = namespace[name] if owner is None else getattr(owner, name)
        return {"value": json.dumps(function(*arguments))}
    except BaseException as error:
        return {"error": _told(error)}


def _told(error: BaseException) -> str:
    try:
        return _quoted(f"{type(error).__name__}: {error}"[:200])
    except BaseException:
        return _quoted("an error that cannot be shown")


def _quoted(text: str) -> str:
    """A text as JSON has it, a number for each character."""
    units = memoryview(text.encode("utf-16", "surrogatepass")).cast("H")[1:]  # -le and -be would be imported
    return "".join(['"', *(f"\\u{unit:04x}" for unit in units), '"'])


def _limit(memory: int, seconds: int, file: int, files: int) -> None:
    """Bound what this process may take: bytes of address space, seconds of CPU, bytes of a file, open files."""
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def _forbid(calls: bytes) -> None:
    """Have the kernel refuse the system calls that its filter, `calls.filter_of`, does not let through."""
    import ctypes  # not where bubblewrap does this: they take a sixth of the time of a small program
    import struct

    buffer = ctypes.create_string_buffer(calls)
    program = ctypes.create_string_buffer(struct.pack("HL", len(calls) // 8, ctypes.addressof(buffer)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    if prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(_PR_SET_SECCOMP, _FILTER, ctypes.addressof(program), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")
