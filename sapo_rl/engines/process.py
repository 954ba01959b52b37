"""vLLM in a child process of this one: started, watched, restarted and never left behind."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from sapo_rl.engines.base import Completion, EngineSettings, IndexedRequest, Request, Sampling
from sapo_rl.engines.child_process import ChildProcess
from sapo_rl.engines.rpc import PendingCall, RpcConnection, RpcLost, RpcTimeout
from sapo_rl.errors import EngineError, UserError, first_line
from sapo_rl.processes import killed_by

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = (
    "No available memory for the cache blocks",
    "To serve at least one request",
    "Free memory on device",
    "Available memory on node",
    "out of memory",
    "can't allocate memory",
)
LACKS = {
    "Read-only file system": "/dev/shm and TMPDIR must be writable",
    "No space left on device": "it needs room in /dev/shm (of a container: --shm-size) and TMPDIR",
    "Too many open files": "raise the limit (ulimit -n)",
}
"""What an error of the machine says, and what helps."""
ERROR = re.compile(r"(\(.*?pid=\d+\) )?(?P<said>(?!.*Engine core initialization failed)[\w.]*(Error|Exception)\b.*)")
"""A line that ends a traceback, of the child or of vLLM's core process; the last one tells why vLLM did not start."""
NO_ROOM_BESIDE = (
    "vLLM does not fit into the GPU's memory beside the trainer; lower rollout.gpu_memory_utilization, "
    "rollout.sync_buffer_gb or trainer.tokens_per_micro_batch, or spread the trainer (launch=fsdp2)"
)
CLOSE_SECONDS = 10.0


def require_vllm() -> None:
    """Raise UserError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed: pip install 'sapo-train[gpu]', or without a GPU 'sapo-train[cpu]'")


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
        self.weights_lock = threading.Lock()
        self._weights: str | None = None
        self._child: ChildProcess | None = None
        self._mending = threading.RLock()
        self._failure = self._tail = ""
        self._closed = False

    def start(self) -> None:
        """Start the child without waiting for it.

        Raises:
            UserError: vLLM is not installed, or its log cannot be written.
        """
        require_vllm()
        # Another seed after a restart: the stream must not repeat samples that were trained on already.
        self._child = ChildProcess(replace(self.settings, seed=self.settings.seed + self.restarts))
        atexit.register(self.close)

    def wait_ready(self) -> None:
        """Wait until the engine can be called. One that is killed while it starts counts as one that dies later.

        Raises:
            UserError: vLLM does not start, not within `settings.start_timeout`, or was killed more often than
                `settings.max_restarts` allows; the message has its own words.
        """
        try:
            self._wait()
        except RpcLost as lost:
            try:
                self._restart(lost)
            except EngineError as error:
                raise UserError(f"{str(error).partition('; ')[0]}; see {self.settings.log_path}") from error

    def _wait(self) -> None:
        """Wait until the child is ready. Raises UserError where another one would not be either, else RpcLost."""
        child = self._running("wait_ready")
        try:
            child.rpc.ready.answer(self.settings.start_timeout)
        except RpcLost as lost:
            code = 0 if isinstance(lost, RpcTimeout) else child.exit_code()
            self._kill()
            if code < 0:
                raise RpcLost(f"its process {killed_by(-code)} while it started", child.rpc) from None
            raise _refusal(self.settings, lost, child.log_tail(200)) from None
        child.rpc.ready.end()

    def stream(
        self, take: Callable[[], IndexedRequest | None], window: int, sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See `Engine.stream`. Raises EngineError where vLLM refuses a request or cannot be kept alive."""
        self._wake_up()
        waiting, unsent = dict[int, Request](), list[IndexedRequest]()
        call: PendingCall | None = None
        try:
            while True:
                while sum(one.n for one in waiting.values()) < window and (taken := take()) is not None:
                    unsent.append(taken)
                    waiting[taken[0]] = taken[1]
                if not waiting:
                    return
                try:
                    call = call or self._running("stream").rpc.call()
                    if unsent:
                        call.send("add", unsent, sampling)
                        unsent = []
                    finished = call.answer()
                except RpcLost as lost:
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
                    with contextlib.suppress(RpcLost):
                        call.send("drop")  # nobody waits for what the child still does for it

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Return the completions of all requests, in their order. Raises what `stream` raises."""
        left = iter(enumerate(requests))
        answers = dict(self.stream(lambda: next(left, None), sum(request.n for request in requests), sampling))
        return [answers[number] for number in range(len(requests))]

    def load_weights(self, layout: str, version: int) -> None:
        """See `Engine.load_weights`. A restart loads from the same memory again."""
        self._weights = layout
        self._call("load_weights", layout)
        self.weight_version, self.asleep = version, False

    def stream_weights(self, layout: str, later: str | None, version: int) -> bool:
        """See `LoadingEngine.stream_weights`. Does not restart: that would wait for the end of the stream."""
        child, self._weights = self._child, later
        if child is None:  # another thread mends it, or nobody can
            return False
        try:
            self._ask(child.rpc, "stream_weights", layout)
        except RpcLost:
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
        if (child := self._child) is not None:
            child.ask_to_end(CLOSE_SECONDS)
        self._kill()

    def _wake_up(self) -> None:
        """Load the weights last loaded once more: sleep may have discarded them."""
        if self.asleep:
            if self._weights is None:
                raise EngineError("the engine sleeps and never got weights to wake up with")
            self.load_weights(self._weights, self.weight_version)

    def _running(self, method: str) -> ChildProcess:
        with self._mending:  # a new child must get the weights before anything else
            if self._closed or self._child is None:
                raise EngineError(self._failure or f"{method} was called on an engine that is not running")
            return self._child

    def _call(self, method: str, *arguments: Any) -> Any:
        while True:
            try:
                return self._ask(self._running(method).rpc, method, *arguments)
            except RpcLost as lost:
                self._restart(lost)

    def _ask(self, rpc: RpcConnection, method: str, *arguments: Any) -> Any:
        """One message there and back. Raises RpcLost where the child is gone, EngineError where it refused the call."""
        call = rpc.call()
        try:
            call.send(method, *arguments)
            return call.answer()
        except EngineError as error:
            if said := _out_of_memory(str(error).splitlines()):
                raise UserError(f"{NO_ROOM_BESIDE}\nIt said, during {method}: {said}") from None
            raise
        finally:
            call.end()

    def _restart(self, lost: RpcLost) -> None:
        """Start a new child with the weights last loaded, as often as the settings allow, unless another thread did."""
        with self._mending:
            reason = str(lost)
            while self._child is None or self._child.rpc is lost.rpc:
                self._kill()
                if self._closed or self.restarts >= self.settings.max_restarts:
                    limit = f"rollout.max_restarts={self.settings.max_restarts}"
                    self._failure = f"vLLM failed after {self.restarts} restarts ({limit}): {reason}; {self._tail}"
                    raise EngineError(self._failure)
                self.restarts += 1
                logger.warning("vLLM failed (%s); restart %d of %d", reason, self.restarts, self.settings.max_restarts)
                try:
                    self.start()
                    self._wait()
                    self.asleep = False
                    with self.weights_lock:
                        if self._weights is not None:
                            self._ask(self._running("load_weights").rpc, "load_weights", self._weights)
                except (RpcLost, EngineError, UserError) as error:
                    reason = first_line(error)
                    self._kill()

    def _kill(self) -> None:
        """Kill the child and what it started; the connection ends with it."""
        if (child := self._child) is not None:
            self._child = None
            child.kill()
            self._tail = child.end_of_log()


def _refusal(settings: EngineSettings, lost: RpcLost, tail: list[str]) -> UserError:
    """Say why vLLM did not start, by the last lines of its log, and what to change."""
    if isinstance(lost, RpcTimeout):
        return UserError(
            f"rollout.start_timeout: vLLM was not ready within {settings.start_timeout:g} s; raise it, or see in "
            f"{settings.log_path} what it waited for"
        )
    reason = _out_of_memory(tail)
    if reason is None:
        errors = [found["said"] for found in map(ERROR.match, tail) if found]
        said = errors[-1][:400] if errors else str(lost)
        helps = "".join(f"; {text}" for mark, text in LACKS.items() if mark in said)
        return UserError(f"vLLM did not start: {said}{helps}\n  see {settings.log_path}")
    keys = "rollout.cpu_kv_cache_gb" if settings.device == "cpu" else "rollout.gpu_memory_utilization"
    return UserError(
        f"vLLM does not fit into memory; change {keys} or lower rollout.max_num_seqs or the lengths.\nIt said: {reason}"
    )


def _out_of_memory(lines: Sequence[str]) -> str | None:
    """Return the last line that says that memory ran out; None where there is none."""
    found = next((line for line in reversed(lines) if any(mark in line for mark in OUT_OF_MEMORY)), None)
    return found and found.strip()[-400:]
