"""vLLM in a child process of this one: started, watched, restarted and never left behind."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sapo_rl.errors import UserError
from sapo_rl.processes import killed_by
from sapo_rl.rollout.engine import Completion, EngineError, EngineSettings, Numbered, Request, Sampling
from sapo_rl.rollout.line import Call, Late, Line, Lost
from sapo_rl.rollout.scratch import temporary_folder, variables
from sapo_rl.streams import UTF8

logger = logging.getLogger(__name__)

LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "WANDB_")
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
OUT_OF_MEMORY = (
    "No available memory for the cache blocks",
    "To serve at least one request",
    "Free memory on device",
    "Available memory on node",
    "out of memory",
    "can't allocate memory",
)
ERROR = re.compile(r"(\(.*?pid=\d+\) )?(?P<said>(?!.*Engine core initialization failed)[\w.]*(Error|Exception)\b.*)")
"""A line that ends a traceback, of the child or of vLLM's core process; the last one tells why vLLM did not start."""
NO_ROOM_BESIDE = (
    "vLLM does not fit into the GPU's memory beside the trainer; lower rollout.gpu_memory_utilization, "
    "rollout.sync_buffer_gb or trainer.tokens_per_micro_batch, or spread the trainer (launch=fsdp2)"
)
CLOSE_SECONDS = 10.0
GROUP_SECONDS = 2.0


def require_vllm() -> None:
    """Raise UserError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed: pip install 'sapo-train[gpu]', or without a GPU 'sapo-train[cpu]'")


def child_environment(
    device: str, environ: Mapping[str, str], cpus: int, devices: int = 1, core_process: bool = False
) -> dict[str, str]:
    """Return the environment of the child: `environ` without the trainer's launcher, its own devices, no telemetry.

    `device` is `cpu` or `cuda:<index>`, the index among the devices that `environ` leaves visible, and `devices` how
    many from there on; `core_process` is that of `EngineSettings`. On the CPU the ranks of this machine share its
    `cpus` cores; a user's own OMP_NUM_THREADS counts where one rank runs (with more, launchers set it to 1).
    """
    env = _bare(environ) | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(core_process))}
    if device != "cpu":
        first = int(device.removeprefix("cuda:"))
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(index) for index in range(first + devices)]
        chosen = ",".join(name.strip() for name in names[first : first + devices])
        return env | {"CUDA_VISIBLE_DEVICES": chosen}
    ranks = int(environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > 1 or "OMP_NUM_THREADS" not in env:
        env["OMP_NUM_THREADS"] = str(max(1, cpus // ranks))
    if devices > 1:  # else vLLM asks for a NUMA node for each worker
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return _on_cpu(env) | {"CUDA_VISIBLE_DEVICES": ""}


def server_environment(environ: Mapping[str, str], on_gpu: bool) -> dict[str, str]:
    """Return the environment of a server: `environ` without a launcher, with all its devices, no telemetry."""
    env = _bare(environ)
    return env if on_gpu else _on_cpu(env)


def _bare(environ: Mapping[str, str]) -> dict[str, str]:
    env = {
        name: value
        for name, value in environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    # Whatever the locale: vLLM does not start where it is ASCII.
    text = {**UTF8, "PYTHONIOENCODING": "utf-8:backslashreplace"}
    more = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    return env | QUIET | text | more


def _on_cpu(env: dict[str, str]) -> dict[str, str]:
    # Waiting threads that spin took nine tenths of the speed of two engines on two cores.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Small functions of vLLM are compiled even in eager mode: 17 s at the first call, and it takes a C++ compiler.
    return env | {"TORCHDYNAMO_DISABLE": "1"}


def _begin_log(path: Path) -> int:
    """Have a file for what the child prints, and return how much is in it already, in bytes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as log:
            return log.tell()
    except OSError as error:
        raise UserError(f"what vLLM prints cannot be written to '{path}': {error}") from error


class LocalEngine:
    """An `Engine` in a child process. `start()` returns at once; `wait_ready()` waits until vLLM has its model.

    A child that dies or says nothing for `settings.timeout` is killed with all its processes and started anew with the
    weights last loaded, and what the interrupted calls have not answered yet is repeated; after `settings.max_restarts`
    of these they raise EngineError.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.weight_version = 0
        self.restarts = 0
        self.asleep = False
        self.steady = threading.Lock()
        self._weights: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._files = contextlib.ExitStack()
        """Deletes the child's temporary files; vLLM leaves some behind."""
        self._line: Line | None = None
        self._mending = threading.RLock()
        self._failure = ""
        self._ended = threading.Event()
        self._log_start = 0
        self._closed = False

    def start(self) -> None:
        """Start the child without waiting for it.

        Raises:
            UserError: vLLM is not installed, or its log cannot be written.
        """
        require_vllm()
        self._log_start = _begin_log(self.settings.log_path)
        ours, theirs = socket.socketpair()
        # A stopped child would otherwise block a large message for ever, poll() or not.
        limit = struct.pack("ll", max(1, int(self.settings.timeout)), 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        with theirs:
            self._process = self._spawn(theirs.fileno())
        self._line = Line(Connection(ours.detach()), self.settings.timeout)
        atexit.register(self.close)
        # Another seed after a restart: the stream must not repeat samples that were trained on already.
        self._line.send(replace(self.settings, seed=self.settings.seed + self.restarts))

    def _spawn(self, fd: int) -> subprocess.Popen[bytes]:
        """Start the process from a thread that lives as long as it does: the kernel's death signal goes by thread."""
        born: Future[subprocess.Popen[bytes]] = Future()
        self._ended = ended = threading.Event()
        command = [sys.executable, "-m", "sapo_rl.rollout.child", str(fd), str(os.getpid())]
        settings, cpus = self.settings, len(os.sched_getaffinity(0))
        env = child_environment(settings.device, os.environ, cpus, settings.tensor_parallel, settings.core_process)
        env |= variables(self._files.enter_context(temporary_folder()), env)

        def keep() -> None:
            try:
                with open(self.settings.log_path, "ab") as log:
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
            ended.wait()

        threading.Thread(target=keep, name="engine-parent", daemon=True).start()
        return born.result()

    def wait_ready(self) -> None:
        """Wait until the engine can be called. One that is killed while it starts counts as one that dies later.

        Raises:
            UserError: vLLM does not start, not within `settings.start_timeout`, or was killed more often than
                `settings.max_restarts` allows; the message has its own words.
        """
        try:
            self._wait()
        except Lost as lost:
            try:
                self._restart(lost)
            except EngineError as error:
                told = str(error).partition("; ")[0]
                raise UserError(f"{told}; see {self.settings.log_path}") from error

    def _wait(self) -> None:
        """Wait until the child is ready. Raises UserError where another one would not be either, else Lost."""
        line = self._running("wait_ready")
        try:
            line.ready.answer(self.settings.start_timeout)
        except Lost as lost:
            code = 0 if isinstance(lost, Late) else self._exit_code()
            self._kill()
            if code < 0:
                raise Lost(f"its process {killed_by(-code)} while it started", line) from None
            raise _refusal(self.settings, lost, self._log_tail(200)) from None
        line.ready.end()

    def stream(
        self, take: Callable[[], Numbered | None], window: int, sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See `Engine.stream`. Raises EngineError where vLLM refuses a request or cannot be kept alive."""
        self._wake_up()
        waiting, unsent = dict[int, Request](), list[Numbered]()
        call: Call | None = None
        try:
            while True:
                while sum(one.n for one in waiting.values()) < window and (taken := take()) is not None:
                    unsent.append(taken)
                    waiting[taken[0]] = taken[1]
                if not waiting:
                    return
                try:
                    call = call or self._running("stream").call()
                    if unsent:
                        call.send("add", unsent, sampling)
                        unsent = []
                    finished = call.answer()
                except Lost as lost:
                    self._restart(lost)
                    call, unsent = None, list(waiting.items())
                    continue
                for number, completions in finished:
                    del waiting[number]
                    yield number, completions
        finally:
            if call is not None:
                call.end()
                if waiting:
                    self._drop(call)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Return the completions of all requests, in their order. Raises what `stream` raises."""
        left = iter(enumerate(requests))
        window = sum(request.n for request in requests)
        answers = dict(self.stream(lambda: next(left, None), window, sampling))
        return [answers[number] for number in range(len(requests))]

    def load_weights(self, layout: str, version: int) -> None:
        """See `Engine.load_weights`. A restart loads from the same memory again."""
        self._weights = layout
        self._call("load_weights", layout)
        self.weight_version, self.asleep = version, False

    def stream_weights(self, layout: str, later: str | None, version: int) -> bool:
        """See `LoadingEngine.stream_weights`. Does not restart: that would wait for the end of the stream."""
        line, self._weights = self._line, later
        if line is None:  # another thread mends it, or nobody can
            return False
        try:
            self._ask(line, "stream_weights", layout)
        except Lost:
            return False
        self.weight_version, self.asleep = version, False
        return True

    def score(self, token_ids: list[int]) -> list[float]:
        """See `Engine.score`."""
        self._wake_up()
        return self._call("score", token_ids)

    def sleep(self) -> None:
        """See `Engine.sleep`."""
        if self.settings.sleep_level and not self.asleep:
            self._call("sleep")
            self.asleep = True

    def close(self) -> None:
        """Stop the child and everything it started; may be called more than once, and from any thread."""
        self._closed = True
        atexit.unregister(self.close)
        process, line = self._process, self._line
        if process is not None and line is not None and line.idle():
            with contextlib.suppress(Lost, subprocess.TimeoutExpired):
                line.send((0, "close", ()))
                process.wait(CLOSE_SECONDS)
        self._kill()

    def _wake_up(self) -> None:
        """Load the weights last loaded once more: sleep may have discarded them."""
        if self.asleep:
            if self._weights is None:
                raise EngineError("the engine sleeps and never got weights to wake up with")
            self.load_weights(self._weights, self.weight_version)

    def _running(self, method: str) -> Line:
        with self._mending:  # a new child must get the weights before anything else
            if self._closed or self._line is None:
                raise EngineError(self._failure or f"{method} was called on an engine that is not running")
            return self._line

    def _call(self, method: str, *arguments: Any) -> Any:
        while True:
            try:
                return self._exchange(method, *arguments)
            except Lost as lost:
                self._restart(lost)

    def _exchange(self, method: str, *arguments: Any) -> Any:
        """One message there and back. Raises Lost where the child is gone, EngineError where it refused the call."""
        return self._ask(self._running(method), method, *arguments)

    def _ask(self, line: Line, method: str, *arguments: Any) -> Any:
        call = line.call()
        try:
            call.send(method, *arguments)
            return call.answer()
        except EngineError as error:
            lines = str(error).splitlines()
            said = next((one.strip() for one in reversed(lines) if any(mark in one for mark in OUT_OF_MEMORY)), None)
            if said is None:
                raise
            raise UserError(f"{NO_ROOM_BESIDE}\nIt said, while it was to {method}: {said[-400:]}") from None
        finally:
            call.end()

    def _drop(self, call: Call) -> None:
        """Have the child end what it still does for a call that nobody waits for."""
        with contextlib.suppress(Lost):
            call.send("drop")

    def _restart(self, lost: Lost) -> None:
        """Start a new child with the weights last loaded, as often as the settings allow, unless another thread did."""
        with self._mending:
            reason = str(lost)
            while self._line in (lost.line, None):
                self._kill()
                if self._closed or self.restarts >= self.settings.max_restarts:
                    self._failure = (
                        f"vLLM failed after {self.restarts} restarts (rollout.max_restarts="
                        f"{self.settings.max_restarts}): {reason}; {self._told(self._log_tail(25))}"
                    )
                    raise EngineError(self._failure)
                self.restarts += 1
                logger.warning("vLLM failed (%s); restart %d of %d", reason, self.restarts, self.settings.max_restarts)
                try:
                    self.start()
                    self._wait()
                    self.asleep = False
                    with self.steady:
                        if self._weights is not None:
                            self._exchange("load_weights", self._weights)
                except (Lost, EngineError, UserError) as error:
                    reason = str(error).splitlines()[0]
                    self._kill()

    def _exit_code(self) -> int:
        """Return how a child that has closed its connection ended; 0 where it has not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process is not None:
                return self._process.wait(GROUP_SECONDS)
        return 0

    def _kill(self) -> None:
        """Kill the child and what it started; the line ends with it."""
        process, self._process, self._line = self._process, None, None
        if process is not None:
            process.kill()
            process.wait()
            _end_group(process.pid)
        self._files.close()
        self._ended.set()

    def _log_tail(self, lines: int) -> list[str]:
        """The last lines that the present child printed."""
        with open(self.settings.log_path, "rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace").splitlines()[-lines:]

    def _told(self, tail: list[str]) -> str:
        return f"the end of {self.settings.log_path}:\n" + "\n".join(tail)


def _refusal(settings: EngineSettings, lost: Lost, tail: list[str]) -> UserError:
    """Say why vLLM did not start, by the last lines of its log, and what to change."""
    if isinstance(lost, Late):
        return UserError(
            f"rollout.start_timeout: vLLM was not ready within {settings.start_timeout:g} s; raise it, or see in "
            f"{settings.log_path} what it waited for"
        )
    reason = next((line for line in reversed(tail) if any(mark in line for mark in OUT_OF_MEMORY)), None)
    if reason is None:
        errors = [found["said"] for found in map(ERROR.match, tail) if found]
        return UserError(f"vLLM did not start: {errors[-1][:400] if errors else lost}\n  see {settings.log_path}")
    keys = "rollout.cpu_kv_cache_gb" if settings.device == "cpu" else "rollout.gpu_memory_utilization"
    return UserError(
        f"vLLM does not fit into memory; change {keys} or lower rollout.max_num_seqs or the lengths.\n"
        f"It said: {reason.strip()[-400:]}"
    )


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
