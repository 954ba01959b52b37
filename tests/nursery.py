"""Forks `python -m MODULE` off processes that have imported what it takes: 10 seconds less than anew, 20 with vLLM.

`python nursery.py FOLDER` listens at FOLDER/runs, and at FOLDER/engines by a second process for what takes vLLM, which
is begun when somebody first asks for it. `forked.Popen` says which process is wanted and keeps the connection: it is
told the process id, and the exit code at the end. A child that is forked has its own signals, descriptors, folder,
environment and path, as one that is started. All end when stdin is closed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import multiprocessing
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import forked

RUNS = (
    "sapo_rl.__main__",
    "sapo_rl.run.cli",
    "sapo_rl.run.rank",
    "sapo_rl.run.packaged",
    "sapo_rl.policy.lora",
    "accelerate.commands.launch",
    "pandas",
    "torch.distributed.run",
    "wandb.sdk.launch.inputs.internal",
)
ENGINES = (
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.llama",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.layers.quantization.online.base",
    "sapo_rl.engines.vllm.child",
)
OF_RUNS = ("sapo_rl", "sapo_rl.run.launch", "sapo_rl.run.rank")
"""What a launcher, forked itself, forks too: these are its own children."""
GETPPID = os.getppid
EXECUTE_CHILD = subprocess.Popen._execute_child  # pyright: ignore[reportAttributeAccessIssue]


def main() -> None:
    folder = Path(sys.argv[1])
    listeners = begin(folder, ("runs", "engines"), RUNS)
    _look_up()
    (folder / "ready").touch()
    serve(*listeners)


def begin(folder: Path, names: Sequence[str], imported: Sequence[str]) -> list[socket.socket]:
    """Listen under these names in the folder, and import what the children need."""
    forked.FOLDER = folder
    listeners = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in names]
    for listener, name in zip(listeners, names, strict=True):
        listener.bind(str(folder / name))
        listener.listen(64)
    sys.path.pop(0)  # the folder of tests
    warnings.filterwarnings("ignore", ".*found in sys.modules after import of package")
    for module in imported:
        importlib.import_module(module)
    return listeners


def _look_up() -> None:
    """Have what libraries find out once in a process, and spare what Hydra composes to find `hydra.mode` alone."""
    from hydra._internal.hydra import Hydra
    from hydra.core.plugins import Plugins
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from wandb.sdk.data_types import _private

    atexit.unregister(_private.MEDIA_TMP.cleanup)  # all have one folder, and the first that ends would delete it
    Hydra.get_mode = lambda *_, **__: None
    Plugins.instance()
    get_checkpoint_conversion_mapping("llama")


def serve(listener: socket.socket, more: socket.socket | None = None) -> None:
    """Fork whatever is asked for; behind `more` there is to be a process with vLLM."""
    gc.freeze()  # or the first collection in a child would copy all of it
    children: dict[int, socket.socket] = {}
    wake, woken = os.pipe()
    for end in (wake, woken):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([0, wake, listener, *([more] if more else [])], [], [])
        if 0 in ready:  # the tests have ended
            raise SystemExit
        if wake in ready:
            os.read(wake, 1 << 16)
            _reap(children)
        if listener in ready:
            asked, _ = listener.accept()
            message, sent, _, _ = socket.recv_fds(asked, forked.LARGEST, 16)
            if not (pid := os.fork()):
                for one in (listener, asked, *children.values(), *([more] if more else [])):
                    one.close()
                _begin(wake, woken)
                _become(pickle.loads(message), sent)
            for descriptor in sent:
                os.close(descriptor)
            children[pid] = asked
            with contextlib.suppress(OSError):  # nobody waits for it any more
                asked.send(str(pid).encode())
        if more and more in ready:
            if not os.fork():
                for one in (listener, *children.values()):
                    one.close()
                _begin(wake, woken)
                _import_vllm()
                serve(more)
            more.close()
            more = None


def _reap(children: dict[int, socket.socket]) -> None:
    """Tell of each child that has ended how it did."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with contextlib.suppress(KeyError, OSError), children.pop(ended[0]) as asked:
                asked.send(str(os.waitstatus_to_exitcode(ended[1])).encode())


def _begin(wake: int, woken: int) -> None:
    """Have a child that was forked end with this process, and take signals as one that was started."""
    from sapo_rl.processes import die_with_parent

    die_with_parent()
    signal.set_wakeup_fd(-1)
    for end in (wake, woken):
        os.close(end)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _import_vllm() -> None:
    from sapo_rl.engines.environment import child_environment

    os.environ.update(child_environment("cpu", os.environ, 1))
    if config := sys.modules.get("torch._dynamo.config"):  # has read the environment already
        config.disable = True
    from vllm.utils import system_utils

    # What vLLM starts has imported all of it, too: it would spawn processes on the CPU.
    system_utils.get_mp_context = functools.partial(multiprocessing.get_context, "fork")
    for name in ENGINES:
        importlib.import_module(name)
    from vllm.platforms import current_platform

    current_platform.register_triton_kernel_overrides()  # looks through every module that there is
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
    gc.unfreeze = lambda: None  # vLLM does so at its end, and collects: that would copy all that was imported


def _become(order: forked.Order, sent: list[int]) -> NoReturn:
    """Be the process that is wanted, to its end."""
    if order.session:
        os.setsid()
    if order.network and not os.path.samefile(order.network, "/proc/self/ns/net"):
        with open(order.network) as namespace:
            assert not ctypes.CDLL(None).setns(namespace.fileno(), 0)
    apart = [fcntl.fcntl(one, fcntl.F_DUPFD, 500) for one in sent]  # none is in the way of another
    for descriptor in {0, 1, 2, *sent}:
        os.close(descriptor)
    for descriptor, number in zip(apart, order.descriptors, strict=True):
        with contextlib.suppress(OSError):
            os.fstat(number)
            raise AssertionError(f"descriptor {number} is in use")
        os.dup2(descriptor, number)
        os.close(descriptor)
    weakref.finalize._registry.clear()  # what is to be done at the server's end
    os.chdir(order.folder)
    os.environ.clear()
    os.environ.update(order.environment)
    sys.path[:0] = [order.folder, *filter(None, order.environment.get("PYTHONPATH", "").split(os.pathsep))]
    if order.environment.get("PYTHONUNBUFFERED"):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
    os.getppid = lambda: order.parent  # in whose place this server is
    os.execve = _execute
    _end(_exit_code(order))


def _exit_code(order: forked.Order) -> int:
    try:
        _run(order.module, order.arguments)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    return 1


def _end(code: int) -> NoReturn:
    """Do what Python does at the end, but for freeing what was imported, of which some tell on stderr."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _execute_child(self: Any, args: Any, executable: Any, *how: Any) -> None:
    """Do as `subprocess.Popen` does, but fork what is part of a run."""
    _, _, passed, folder, environment, _, _, _, *pipes = how[:14]
    command = [one for one in args if one != "-u"]
    if command[:2] != [sys.executable, "-m"] or command[2] not in OF_RUNS:
        EXECUTE_CHILD(self, args, executable, *how)
        return
    numbers, session = [0, 1, 2, *passed], how[-2]
    surroundings = dict(os.environ if environment is None else environment)
    order = forked.Order(command[2], command[3:], folder or os.getcwd(), surroundings, numbers, session, os.getpid())
    given = [number if own == -1 else own for number, own in enumerate((pipes[0], pipes[3], pipes[5]))]
    self.pid = os.fork()
    if not self.pid:
        try:
            _forget([*given, *passed])
            _become(order, [*given, *passed])
        finally:
            os._exit(1)
    self._child_created = True
    self._close_pipe_fds(*pipes)


def _forget(kept: Sequence[int]) -> None:
    """Have signals and descriptors as a process has that was just started."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor not in kept:
            with contextlib.suppress(OSError):  # of the folder itself
                os.close(descriptor)


def _end_with_parent() -> None:
    from sapo_rl.processes import die_with_parent

    die_with_parent()
    os.getppid = GETPPID


def _execute(program: str, command: list[str], environment: dict[str, str]) -> NoReturn:
    """Do as `os.execve` of `python -m MODULE`, in this process."""
    _, _, module, *arguments = command
    os.environ.clear()
    os.environ.update(environment)
    _run(module, arguments)


def _run(module: str, arguments: list[str]) -> NoReturn:
    forked.take_engines()
    subprocess.Popen._execute_child = _execute_child  # pyright: ignore[reportAttributeAccessIssue]
    Path("/proc/self/comm").write_text(forked.name_of(module))
    if "vllm" in sys.modules:  # what it forks ends with it, as what it spawns does
        os.register_at_fork(after_in_child=_end_with_parent)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    raise SystemExit


if __name__ == "__main__":
    main()
