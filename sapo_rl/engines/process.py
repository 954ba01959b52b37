"""vLLM in a child process of this one: started, watched, restarted and never left behind."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from sapo_rl.engines.base import Completion, EngineSettings, Request, Sampling, failed
from sapo_rl.engines.child_process import ChildProcess
from sapo_rl.engines.failures import failed_start, too_slow_a_start
from sapo_rl.engines.rpc import RpcConnection
from sapo_rl.errors import EngineError, EngineLost, UserError, first_line
from sapo_rl.processes import killed_by

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0


def require_vllm() -> None:
    """Raise UserError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed: pip install 'sapo-train[gpu]', or without a GPU 'sapo-train[cpu]'")


class LocalEngine:
    """An `Engine` in a child process. `start()` returns at once; `wait_ready()` waits until vLLM has its model.

    A child that dies or says nothing for `settings.timeout` is lost. `recover`, which all calls but `submit` and
    `stream_weights` do by themselves, kills it with all its processes and starts another with the weights last loaded,
    `settings.max_restarts` times; beyond that it raises EngineError.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.weight_version = 0
        self.restarts = 0
        self.asleep = False
        self.weights_lock = threading.Lock()
        self._weights: str | None = None
        self._child: ChildProcess | None = None
        self._rpc: RpcConnection | None = None
        """To the child, once it is ready and has the weights last loaded."""
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
        with self._mending:
            if self._child is None:
                raise EngineError("wait_ready was called on an engine that is not running")
            try:
                self._rpc = self._await_child(self._child)
            except EngineLost as lost:
                try:
                    self._restart(str(lost))
                except EngineError as error:
                    raise UserError(f"{str(error).partition('; ')[0]}; see {self.settings.log_path}") from error

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> list[Future[list[Completion]]]:
        """See `Engine.submit`. What vLLM refuses fails its future with EngineError."""
        rpc = self._rpc
        if rpc is None:
            return [failed(EngineLost("it is not running")) for _ in requests]
        self.asleep = False
        return rpc.calls("add", [(request, sampling) for request in requests])

    def recover(self) -> None:
        """See `Engine.recover`."""
        self._running()

    def load_weights(self, layout: str, version: int) -> None:
        """See `LoadingEngine.load_weights`. A restart loads from the same memory again."""
        self._weights = layout
        while True:
            with contextlib.suppress(EngineLost):
                self._loaded(version, self._running().call("load_weights", layout))
                return

    def stream_weights(self, layout: str, later: str | None, version: int) -> bool:
        """See `LoadingEngine.stream_weights`. Does not restart: that would wait for the end of the stream."""
        rpc, self._weights = self._rpc, later
        if rpc is None:  # another thread restarts it, or nobody can
            return False
        try:
            self._loaded(version, rpc.call("stream_weights", layout, later))
        except EngineLost:
            return False
        return True

    def score(self, token_ids: list[int]) -> list[float]:
        """See `Engine.score`."""
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

    def _call(self, method: str, *arguments: Any) -> Any:
        """Return the child's answer, if need be another child's."""
        while True:
            with contextlib.suppress(EngineLost):
                answer = self._running().call(method, *arguments).result()
                self.asleep = False
                return answer

    def _loaded(self, version: int, loading: Future[None]) -> None:
        """Wait until weights are loaded."""

        def renew(done: Future[None]) -> None:
            if done.exception() is None:
                self.weight_version, self.asleep = version, False

        loading.add_done_callback(renew)  # comes before the answers that those weights have written
        loading.result()
        renew(loading)  # and before this returns

    def _await_child(self, child: ChildProcess) -> RpcConnection:
        """Wait until the child is ready. Raises UserError where another one would not be either, else EngineLost."""
        try:
            child.rpc.ready.result(self.settings.start_timeout)
        except TimeoutError:
            self._kill()
            raise too_slow_a_start(self.settings) from None
        except EngineLost as lost:
            code = child.exit_code()
            self._kill()
            if code < 0:
                raise EngineLost(f"its process {killed_by(-code)} while it started") from None
            raise failed_start(self.settings, str(lost), child.log_tail(200)) from None
        return child.rpc

    def _running(self) -> RpcConnection:
        """Return the connection to a child that has the weights last loaded, another one's where it was lost."""
        with self._mending:
            if self._rpc is None:
                raise EngineError(self._failure or "the engine is not running")
            return self._restart(self._rpc.lost) if self._rpc.lost else self._rpc

    def _restart(self, reason: str) -> RpcConnection:
        """Start a new child with the weights last loaded, as often as the settings allow."""
        while True:
            self._kill()
            if self._closed or self.restarts >= self.settings.max_restarts:
                limit = f"rollout.max_restarts={self.settings.max_restarts}"
                self._failure = f"vLLM failed after {self.restarts} restarts ({limit}): {reason}; {self._tail}"
                raise EngineError(self._failure)
            self.restarts += 1
            logger.warning("vLLM failed (%s); restart %d of %d", reason, self.restarts, self.settings.max_restarts)
            try:
                self.start()
                assert self._child is not None
                rpc = self._await_child(self._child)
                self.asleep = False
                with self.weights_lock:
                    if self._weights is not None:
                        rpc.call("load_weights", self._weights).result()
                self._rpc = rpc
                return rpc
            except (EngineLost, EngineError, UserError) as error:
                reason = first_line(error)

    def _kill(self) -> None:
        """Kill the child and what it started; the connection ends with it."""
        self._rpc = None
        if (child := self._child) is not None:
            self._child = None
            child.kill()
            self._tail = child.end_of_log()
