"""The child process that holds vLLM, started by `LocalEngine`: `python -m sapo_rl.engines.vllm.child FD PARENT_PID`.

It receives `EngineSettings`, builds the engine, sends `(0, "ready", None)`, and then answers each message `(call,
method, arguments)` with `(call, "done", result)` or `(call, "failed", traceback)`. Messages `add` with the same number
belong to one call, answered by `(call, "part", completions)` whenever requests are finished, until `drop` ends what is
left of it. Several calls may be under way; weights are replaced between two steps of decoding. A vLLM that fails while
it decodes ends this process, for its parent to restart.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import sys
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, NamedTuple

from sapo_rl.engines.base import Completion, EngineSettings, IndexedRequest, Sampling
from sapo_rl.engines.vllm.adapter import completions_of, sampling_params, scores_of, scoring_params
from sapo_rl.processes import die_with_parent, kill_group_on_hangup, streams

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Return batch sizes for CUDA graphs that leave no batch of up to `max_num_seqs` without one.

    vLLM pads a batch to the next size captured, and by default runs batches above 512 without a graph.
    """
    sizes = {1, 2, 4, *range(8, 257, 8), *range(272, max_num_seqs, 16), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


def llm_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`: tokens in, tokens out, as little Python per token as it allows."""
    arguments: dict[str, Any] = {
        "model": settings.model,
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
        "dtype": settings.dtype,
        "seed": settings.seed,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # else the model's own sampling defaults would creep in
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from, not before temperature
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "worker_extension_cls": "sapo_rl.engines.vllm.worker.WeightReceiver",
    }
    if settings.device == "cpu":
        memory = int(settings.cpu_kv_cache_gb * 2**30)
        return arguments | {"enforce_eager": True, "kv_cache_memory_bytes": memory}
    if settings.kv_cache_bytes is not None:
        arguments["kv_cache_memory_bytes"] = settings.kv_cache_bytes
    return arguments | {
        "enforce_eager": settings.enforce_eager,
        "enable_sleep_mode": settings.sleep_level > 0,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "disable_cascade_attn": True,  # gives other log-probs than the plain kernels on some GPUs
        "compilation_config": {"cudagraph_capture_sizes": capture_sizes(settings.max_num_seqs)},
    }


def register(settings: EngineSettings) -> None:
    """Give vLLM the model's class: it would look for it in a process of its own, which imports vLLM once more."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    config = AutoConfig.from_pretrained(
        settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )
    for name in config.architectures or ():
        if known := ModelRegistry.models.get(name):
            ModelRegistry.register_model(name, known.load_model_cls())


class Running(NamedTuple):
    """A request under way."""

    call: int
    number: int | None
    """The parent's; None where it is to be scored."""


Message = tuple[int, str, Any]
"""Call, status and result."""


class VllmProcess:
    """The methods that the parent may call, on one `vllm.LLM`."""

    def __init__(self, settings: EngineSettings) -> None:
        from vllm import LLM

        register(settings)
        self.settings = settings
        self.running: dict[str, Running] = {}
        """By vLLM's name of the request."""
        self.loads = 0
        self.asleep = False
        self.llm: LLM = LLM(**llm_arguments(settings))

    def add(self, call: int, requests: list[IndexedRequest], sampling: Sampling) -> None:
        """Put requests under way; `step` returns their completions."""
        params = [sampling_params(request, sampling, self.settings.stop_token_ids) for _, request in requests]
        numbers = [number for number, _ in requests]
        self._enqueue(call, numbers, [request.token_ids for _, request in requests], params)

    def score(self, call: int, token_ids: list[int]) -> None:
        """See `Engine.score`; `step` returns the answer."""
        self._enqueue(call, [None], [token_ids], [scoring_params()])

    def _enqueue(
        self, call: int, numbers: Sequence[int | None], prompts: list[list[int]], params: list[SamplingParams]
    ) -> None:
        # What the cache holds of a prompt belongs to the weights that wrote it.
        salted: Any = [{"prompt_token_ids": token_ids, "cache_salt": str(self.loads)} for token_ids in prompts]
        names = self.llm.enqueue(salted, params, use_tqdm=False)
        for name, number in zip(names, numbers, strict=True):
            self.running[name.partition("-")[0]] = Running(call, number)  # outputs do not carry the random part

    def step(self) -> list[Message]:
        """Decode one token of each completion; return what this finished. A failure leaves vLLM dead."""
        try:
            outputs = [output for output in self.llm.llm_engine.step() if output.finished]
        except Exception as error:
            from vllm.v1.engine.exceptions import EngineDeadError

            raise EngineDeadError from error
        parts: dict[int, list[tuple[int, list[Completion]]]] = {}
        messages: list[Message] = []
        for output in outputs:
            call, number = self.running.pop(output.request_id)
            if number is None:
                messages.append((call, "done", scores_of(output)))  # type: ignore[arg-type]
            else:
                parts.setdefault(call, []).append((number, completions_of(output)))  # type: ignore[arg-type]
        return messages + [(call, "part", part) for call, part in parts.items()]

    def drop(self, call: int) -> None:
        """End what is under way for a call."""
        names = [name for name, request in self.running.items() if request.call == call]
        if names:
            self.llm.llm_engine.abort_request(names)
        for name in names:
            del self.running[name]

    def load_weights(self, layout: str) -> None:
        """See `LoadingEngine.load_weights`. Wakes up as far as needed."""
        self._receive("receive_shared", layout)

    def stream_weights(self, layout: str) -> None:
        """See `LoadingEngine.stream_weights`. Wakes up as far as needed."""
        self._receive("receive_stream", layout)

    def _receive(self, method: str, layout: str) -> None:
        if self.asleep:
            self.llm.wake_up(["weights"])
        self.llm.collective_rpc(method, args=(layout,))
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
            self.asleep = False
        self.loads += 1

    def sleep(self) -> None:
        """See `Engine.sleep`."""
        self.llm.sleep(self.settings.sleep_level)
        self.asleep = True

    def close(self) -> None:
        """Stop vLLM's core process, where it has one."""
        self.llm.llm_engine.engine_core.shutdown()


def serve(connection: Connection) -> None:
    """Answer the parent's messages until it asks to close; decode while there is none."""
    server = VllmProcess(connection.recv())
    from vllm.v1.engine.exceptions import EngineDeadError

    inbox: queue.SimpleQueue[tuple[int, str, tuple[Any, ...]]] = queue.SimpleQueue()
    # Read at all times: two processes that both wait for the other to take a message would wait for ever.
    threading.Thread(target=_read, args=(connection, inbox), name="inbox", daemon=True).start()
    closing = threading.Event()
    threading.Thread(target=_die_with_core, args=(closing,), name="core", daemon=True).start()
    connection.send((0, "ready", None))
    refused: set[int] = set()
    while True:
        if server.running and inbox.empty():
            for message in server.step():
                connection.send(message)
            continue
        call, method, arguments = inbox.get()
        if method == "close":
            closing.set()
            server.close()
            return
        if call in refused:  # more of a call that has failed
            continue
        try:
            if method in ("add", "score", "drop"):
                getattr(server, method)(call, *arguments)
            else:
                connection.send((call, "done", getattr(server, method)(*arguments)))
        except EngineDeadError:
            raise
        except Exception:  # the same call would fail again in a new engine: tell, do not die
            traceback.print_exc()
            refused.add(call)
            server.drop(call)
            connection.send((call, "failed", traceback.format_exc(limit=-4)))


def _die_with_core(closing: threading.Event) -> None:
    """End this process when vLLM's core process ends unasked: vLLM would wait for an answer of it for ever."""
    if cores := multiprocessing.active_children():  # none where the core is part of this process
        wait([core.sentinel for core in cores])
        if not closing.is_set():
            os._exit(1)


def _read(connection: Connection, inbox: queue.SimpleQueue[tuple[int, str, tuple[Any, ...]]]) -> None:
    """Until the parent is gone, which ends this process by other means."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())


def main() -> None:
    """Tie the process to its parent and serve it."""
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    streams.outlive()
    os.set_inheritable(fd, False)
    kill_group_on_hangup(fd)
    status = 1
    try:
        serve(Connection(fd))
        status = 0
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # vLLM is shut down, or dead; Python's own tidying up would take seconds, or hang


if __name__ == "__main__":
    main()
