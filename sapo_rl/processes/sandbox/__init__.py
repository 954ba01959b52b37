"""Running a program that a model wrote: apart from everything, bounded in everything, gone when it ends.

    caller -- asyncio --> bwrap -- namespaces, system call filter --> Python with inside.py -- limits --> the program

Bubblewrap gives the program namespaces of its own: no network, no process but its own to see or to signal, and a file
system of the Python installation, read-only, and a small /tmp in memory. The filter refuses new processes, and
`inside.py` bounds memory, CPU time and files. Whatever ends the program ends all that belongs to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import marshal
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, TypeVar, get_args
from weakref import WeakKeyDictionary

from sapo_rl.processes import is_dry_run
from sapo_rl.processes.guardian import kill_descendants
from sapo_rl.processes.sandbox import inside
from sapo_rl.processes.sandbox.calls import MACHINES, filter_of
from sapo_rl.processes.sandbox.job import MEGABYTE, Job, Limits, Result, SandboxMissing, by_key, task_of
from sapo_rl.processes.sandbox.service import Service as Service
from sapo_rl.processes.sandbox.service import run_a_probe

Isolation = Literal["bubblewrap", "none"]
"""`none`: limits and the filter of system calls alone; the program sees the user's files."""
Sandbox: TypeAlias = Isolation | Service
"""A service's programs run elsewhere."""
INSTALL = "apt-get install bubblewrap (dnf install bubblewrap)"

_T = TypeVar("_T")
_PYTHON = os.path.realpath(sys.executable)  # what a virtual environment's leads to
_START = """
import marshal, sys
task, names = open(int(sys.argv[1]), "rb"), {"__name__": "sandbox"}
exec(marshal.load(task), names)
names["main"](task, int(sys.argv[2]))
"""
_CHUNK = 1 << 14  # bytes read at once
_LONGEST_REPORT = 1 << 22  # bytes of all reports of a run
_START_SECONDS = 20.0  # until the program begins
_ROOMS: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


async def run(job: Job, limits: Limits, sandbox: Sandbox = "bubblewrap") -> Result:
    """Run a program by itself and return how it ended, whatever it does.

    Raises:
        SandboxMissing: as `check`.
        OSError: the machine, or the service, did not start it, which is no fault of the program.
    """
    if isinstance(sandbox, Service):
        return await sandbox.run(job, limits)
    isolation = _isolation(sandbox)
    key = secrets.token_hex(16)  # lines that a program writes without having looked for it are no reports
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reports, _folder(isolation) as folder:
        with (
            os.fdopen(writing, "wb"),
            _memory_file(_task(job, limits, key, isolation)) as task,
            _memory_file(filter_of(platform.machine())) as calls,
        ):
            given = [task, writing] if isolation == "none" else [task, writing, calls]
            starting = asyncio.create_subprocess_exec(
                *_command(limits, isolation, task, writing, calls),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=given,
                env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder or "/tmp"},
                cwd=folder,
                start_new_session=True,
            )
            process = await _started(starting)
        run = _Run(process, limits)
        try:
            await run.follow(job.stdin.encode(errors="replace"), await _stream(reports))
        finally:
            code = await _ended(process)
    stdout, stderr = (text.decode(errors="replace") for text in (run.stdout, run.stderr))
    found = by_key(bytes(run.reports).splitlines(), key)
    if not found:
        raise OSError(
            "the sandbox did not start a program: "
            f"{stderr.strip()[-300:] or (f'not in {_START_SECONDS:g} s' if run.stopped else f'exit code {code}')}"
        )
    return Result(code if code >= 0 else 128 - code, stdout, stderr, run.stopped, found[1:], run.seconds)


def processors() -> int:
    """Return how many processors of the machine are this rank's to use, where its ranks share them evenly."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def room(sandbox: Sandbox, at_once: int | None = None) -> AbstractAsyncContextManager[None]:
    """Return what to enter before `run` where many programs are run: they wait while others have the machine.

    Args:
        sandbox: where they are run; a service bounds them by itself.
        at_once: programs of this event loop that run at the same time, the first call's; None takes `processors`.
    """
    if isinstance(sandbox, Service):
        return contextlib.nullcontext()
    return _ROOMS.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(at_once or processors()))


async def _started(starting: Coroutine[Any, Any, asyncio.subprocess.Process]) -> asyncio.subprocess.Process:
    """Start a process whole, and end it where this is cancelled meanwhile: asyncio ends its first process alone."""
    task, cancelled = await _done(starting)
    if cancelled is None:
        return task.result()
    if task.exception() is None:
        await _ended(task.result())
    raise cancelled


async def _ended(process: asyncio.subprocess.Process) -> int:
    """End a process, close its pipes, which the garbage collection would do else, and return its exit code."""
    if process.returncode is None:
        _kill(process.pid)
    _, cancelled = await _done(process.communicate())
    if cancelled is not None:
        raise cancelled
    assert process.returncode is not None
    return process.returncode


async def _done(work: Coroutine[Any, Any, _T]) -> tuple[asyncio.Task[_T], asyncio.CancelledError | None]:
    """Do something to its end, however often this is cancelled, as at the end of an event loop; return the last."""
    task, cancelled = asyncio.ensure_future(work), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    return task, cancelled


def _kill(pid: int) -> None:
    """End bubblewrap and what it has started. It is stopped before, or could start the program meanwhile."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    kill_descendants(pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def check(sandbox: str | Mapping[str, Any]) -> Sandbox:
    """Return where programs are run, `bubblewrap`, `none` or the settings of a service, which `reach` asks.

    Raises:
        SandboxMissing: another word; no bubblewrap, or none that this user may use here; an unknown kind of processor;
            settings that cannot be.
    """
    return Service.of(sandbox) if isinstance(sandbox, Mapping) else _isolation(sandbox)


def reach(sandbox: Sandbox) -> None:
    """Have a service run a small program, once in a process, unless that belongs to a dry run.

    On this machine `check` has seen to that.

    Raises:
        SandboxMissing: it does not; the message says why.
    """
    if isinstance(sandbox, Service) and not is_dry_run():
        run_a_probe(sandbox)


@cache
def _isolation(isolation: str) -> Isolation:
    """The word, where it can be used on this machine."""
    if isolation not in get_args(Isolation):
        raise SandboxMissing(f"sandbox is '{isolation}'; valid: {', '.join(get_args(Isolation))}, or {{url: ...}}")
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        known = ", ".join(MACHINES)
        raise SandboxMissing(
            f"programs are run on Linux on {known} alone, this is {sys.platform} on {platform.machine()}"
        )
    if isolation == "none":
        return "none"
    if shutil.which("bwrap") is None:
        raise SandboxMissing(f"needs bubblewrap to isolate programs: {INSTALL}")
    with _memory_file(filter_of(platform.machine())) as calls:
        command = [*_bubblewrap(Limits()), "--seccomp", str(calls), _PYTHON, "-ISc", ""]
        tried = subprocess.run(command, pass_fds=[calls], capture_output=True, text=True)
    if tried.returncode:
        raise SandboxMissing(
            f"bubblewrap cannot isolate programs here: {tried.stderr.strip() or f'exit code {tried.returncode}'}; "
            "in a container, allow user namespaces (docker run --security-opt seccomp=unconfined, on a host with "
            "AppArmor --security-opt apparmor=unconfined too)"
        )
    return "bubblewrap"


class _Run:
    """A process that is under way, and what it has written."""

    def __init__(self, process: asyncio.subprocess.Process, limits: Limits) -> None:
        self._process, self._limits = process, limits
        self.stdout, self.stderr, self.reports = bytearray(), bytearray(), bytearray()
        self.stopped: Literal["", "seconds", "output"] = ""
        self.seconds = 0.0
        """Since the program has begun."""
        self._timer: asyncio.TimerHandle | None = None

    async def follow(self, stdin: bytes, reports: asyncio.StreamReader) -> None:
        """Hand it its input and read what it writes until it ends."""
        process, most = self._process, self._limits.output_bytes
        assert process.stdout and process.stderr
        self._allow(_START_SECONDS)
        try:
            await asyncio.gather(
                self._write(stdin),
                self._read(process.stdout, self.stdout, most),
                self._read(process.stderr, self.stderr, most),
                self._hear(reports),
                process.wait(),
            )
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _allow(self, seconds: float) -> None:
        """Have it stopped so many seconds from now, not before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._stop, "seconds")

    def _stop(self, why: Literal["seconds", "output"]) -> None:
        self.stopped = self.stopped or why
        if self._process.returncode is None:
            _kill(self._process.pid)

    async def _write(self, stdin: bytes) -> None:
        stream = self._process.stdin
        assert stream is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it reads no further
            stream.write(stdin)
            await stream.drain()
        stream.close()

    async def _hear(self, reports: asyncio.StreamReader) -> None:
        """Read its reports, of which the first says that the program begins: its time is its own."""
        self.reports += await reports.read(_CHUNK)
        begun = time.monotonic()
        if self.reports:
            self._allow(self._limits.seconds)
        await self._read(reports, self.reports, _LONGEST_REPORT)
        await self._process.wait()
        self.seconds = time.monotonic() - begun

    async def _read(self, stream: asyncio.StreamReader, into: bytearray, most: int) -> None:
        while found := await stream.read(_CHUNK):
            room = most - len(into)
            into += found[:room]
            if len(found) > room:
                self._stop("output")


async def _stream(pipe: BinaryIO) -> asyncio.StreamReader:
    """Give a stream of what arrives in a pipe."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return reader


def _task(job: Job, limits: Limits, key: str, isolation: Isolation) -> bytes:
    forbidden = filter_of(platform.machine()) if isolation == "none" else b""  # else bubblewrap's to forbid
    return _compiled() + marshal.dumps({**task_of(job, limits, key), "forbidden": forbidden})


def _command(limits: Limits, isolation: Isolation, task: int, report: int, calls: int) -> list[str]:
    python = [_PYTHON, "-ISB", "-c", _START, str(task), str(report)]
    return python if isolation == "none" else [*_bubblewrap(limits), "--seccomp", str(calls), *python]


def _bubblewrap(limits: Limits) -> list[str]:
    """The part of a command line that shows what follows nothing but Python, read-only, and an empty /tmp."""
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    command += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    for name in ("usr", "bin", "sbin", "lib", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            command += ["--symlink", os.readlink(path), str(path)]
        elif path.exists():
            command += ["--ro-bind", str(path), str(path)]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    prefix = os.path.realpath(sys.base_prefix)  # as of _PYTHON: some are reached by a link
    if not Path(prefix).is_relative_to("/usr"):
        command += ["--ro-bind", prefix, prefix]
    command += ["--dev", "/dev", "--remount-ro", "/dev"]  # /dev/shm too: what lies there counts as nobody's memory
    command += ["--size", str(limits.disk_mb * MEGABYTE), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    return [*command, "--remount-ro", "/"]


@cache
def _compiled() -> bytes:
    """`inside.py` for the same Python as this one."""
    return marshal.dumps(compile(Path(inside.__file__).read_text(encoding="utf-8"), "sandbox.py", "exec"))


@contextlib.contextmanager
def _memory_file(content: bytes) -> Iterator[int]:
    """Give the descriptor of a file in memory, at its start."""
    with os.fdopen(os.memfd_create("sandbox"), "w+b") as stream:
        stream.write(content)
        stream.seek(0)
        yield stream.fileno()


@contextlib.contextmanager
def _folder(isolation: Isolation) -> Iterator[str | None]:
    """Give the folder in which a program runs that is not isolated."""
    if isolation == "bubblewrap":
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="sapo-program-", ignore_cleanup_errors=True) as folder:
        yield folder
