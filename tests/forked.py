"""Processes whose imports are done before they begin: ten seconds less than anew, twenty with vLLM.

`nursery.py` forks them off servers that import everything once for all tests of a worker. `start` goes the way of
`torchrun --nproc_per_node=1`: the process that reads the arguments is the rank; `launch` goes a user's. Of each kind of
start some are left to `command.start`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple, cast

import psutil
from command import ROOT, folders, free_port
from waiting import until

FOLDER: Path | None = None
"""Where the servers listen."""
SERVERS: list[subprocess.Popen[bytes]] = []
"""Those that this process has started; their stdin stays open."""
LARGEST = 1 << 17
"""Bytes of an order."""


class Order(NamedTuple):
    """What a child is to be."""

    module: str
    arguments: list[str]
    folder: str
    environment: dict[str, str]
    descriptors: list[int]
    """The numbers that it has for those that are sent along."""
    session: bool
    """Whether it has one of its own."""
    parent: int
    """The process that asks for it."""
    network: str = ""
    """The file of the network namespace that it is in, unless it is that of all."""


class Popen:
    """Does as `subprocess.Popen` of `python -m MODULE ...`; `server` forks it, `runs` or `engines`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        server: str | Path = "runs",
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None,
        pass_fds: Sequence[int] = (),
        start_new_session: bool = False,
        network: str = "",
    ) -> None:
        self.stdin: IO[bytes] | None = None
        self.stderr: IO[bytes] | None = None
        if stdin == subprocess.PIPE:
            reads, end = os.pipe()
            self.stdin = os.fdopen(end, "wb", 0)
        else:
            reads = os.open(os.devnull, os.O_RDONLY)
        if piped := stderr == subprocess.PIPE:
            end, stderr = os.pipe()
            self.stderr = os.fdopen(end, "rb")
        _, option, module, *arguments = command
        assert option == "-m" and stdin in (subprocess.DEVNULL, subprocess.PIPE)
        outputs = (1 if stdout is None else stdout, 2 if stderr is None else stderr)
        given = [reads, *(one if isinstance(one, int) else one.fileno() for one in outputs)]
        surroundings = dict(os.environ if env is None else env)
        numbers = [0, 1, 2, *pass_fds]
        place, parent = str(cwd or os.getcwd()), os.getpid()
        order = Order(module, arguments, place, surroundings, numbers, start_new_session, parent, network)
        self.printed: tuple[IO[bytes], ...] = ()
        self._lock = threading.Lock()
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect(str(server if isinstance(server, Path) else nursery() / server))
        socket.send_fds(self._server, [pickle.dumps(order)], [*given, *pass_fds])
        os.close(reads)
        if piped:
            os.close(given[2])
        self.pid = int(self._server.recv(16))
        self.returncode: int | None = None

    def __enter__(self) -> Popen:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        if self.stderr:
            self.stderr.close()

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not wait([self._server], timeout):
            raise subprocess.TimeoutExpired("a process that was forked", timeout or 0)
        with self._lock:
            if self.returncode is None:
                self.returncode = int(self._server.recv(16))
                self._server.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; return what was printed on stdout and stderr, where `start` has kept it."""
        self.wait(timeout)
        told = []
        for file in self.printed:
            file.seek(0)
            told.append(file.read().decode())
            file.close()
        return told[0], told[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def nursery() -> Path:
    """The folder of the servers, which are started where they are not."""
    global FOLDER
    if FOLDER is None:
        FOLDER = serving("nursery.py")
    return FOLDER


def serving(script: str) -> Path:
    """Start a script of this folder; return the folder in which it listens, once it is ready."""
    folder = Path(tempfile.mkdtemp(prefix="sapo-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    log, ready = folder / "log", folder / "ready"
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as out:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=out, stderr=out)
    SERVERS.append(server)
    until(lambda: ready.exists() or server.poll() is not None, 300)
    assert ready.exists(), log.read_text()
    return folder


def take_engines() -> None:
    """Have engines that this process starts forked, too, but for those on a GPU."""
    from sapo_rl.engines import child_process

    nursery()

    def popen(command: Sequence[str], *, env: Mapping[str, str], **how: Any) -> Popen | subprocess.Popen[bytes]:
        if env["CUDA_VISIBLE_DEVICES"]:
            return subprocess.Popen(command, env=env, **how)
        return Popen(command, server="engines", env=env, network=f"/proc/{os.getpid()}/ns/net", **how)

    child_process.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": popen})


def engine_with(log: Path) -> psutil.Process:
    """The process of this one's engine that writes to `log`."""

    def found() -> psutil.Process | None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error, OSError):  # it has just ended
                leads = os.getsid(process.pid) == process.pid  # unlike what vLLM starts
                if leads and any(file.path == str(log) for file in process.open_files()):
                    return process
        return None

    return cast(psutil.Process, until(found))


def name_of(module: str) -> str:
    """What the kernel calls a process that was forked to run a module: it keeps 15 characters."""
    return module[-15:]


def is_module(process: psutil.Process, module: str) -> bool:
    """Whether a process runs a module, forked or started."""
    return process.name() == name_of(module) or module in process.cmdline()


def launch(workspace: Path, *arguments: str, module: str = "sapo_rl", network: str = "", **environment: str) -> Popen:
    """Start the command line as a user does, or a launcher: ranks are children of those that start them.

    `network` is the file of a network namespace.
    """
    own = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    surroundings = {**own, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", module, *arguments]
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  # closed by communicate
    process = Popen(command, cwd=workspace, env=surroundings, stdout=out, stderr=err, network=network)
    process.printed = (out, err)
    return process


def start(workspace: Path, *arguments: str, **environment: str) -> Popen:
    """Start the command line in `workspace`; `environment` is beside the test's own."""
    return launch(workspace, *arguments, **{"RANK": "0", **environment})


def run(
    workspace: Path,
    *arguments: str,
    seconds: float = 600,
    begin: Callable[..., Popen] = start,
    **how: str,
) -> tuple[int, str, str]:
    """Begin, and wait for the end; return the exit code and what was printed on stdout and stderr."""
    process = begin(workspace, *arguments, **how)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    out, err = process.communicate()
    assert process.returncode is not None and process.returncode >= 0, out + err
    return process.returncode, out, err


def ranks(module: str, count: int, *arguments: str, **environment: str) -> None:
    """Have ranks run a module of tests to a good end, as `torchrun` would."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    common = {**os.environ, **environment, **rendezvous, "LOCAL_WORLD_SIZE": str(count), "PYTHONPATH": path}
    command = [sys.executable, "-m", module, *arguments]
    with tempfile.TemporaryFile() as told:
        started = [
            Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=told, stderr=told)
            for rank in range(count)
        ]
        try:
            until(lambda: any(one.poll() for one in started) or all(one.poll() == 0 for one in started), 600)
            told.seek(0)
            assert not any(one.poll() for one in started), told.read().decode(errors="replace")[-8000:]
        finally:
            for process in started:
                process.kill()


def new_run(workspace: Path, *arguments: str, **how: Any) -> Path:
    """Run `tiny.yaml` to a good end and return the one folder that it made."""
    before = folders(workspace)
    code, out, err = run(workspace, "config=tiny.yaml", *arguments, **how)
    assert code == 0, out + err
    (folder,) = folders(workspace) - before
    return folder
