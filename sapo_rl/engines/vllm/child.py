"""The child process that holds vLLM, started by `LocalEngine`: `python -m sapo_rl.engines.vllm.child FD PARENT_PID`.

It receives `EngineSettings`, builds the engine, and answers call 0 once it can be called. From then on a message is a
list of calls `(number, method, arguments)`, which are all taken up before the next step of decoding, and is answered by
lists of `(number, "done", result)` or `(number, "failed", traceback)`; `drop` ends the call of that number without an
answer. Weights are replaced between two steps. A vLLM that fails while it decodes ends this process, for its parent to
restart.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, NamedTuple

from sapo_rl.config.model import vllm_rank
from sapo_rl.engines.base import EngineSettings, Request, Sampling
from sapo_rl.engines.rpc import Answer, Call
from sapo_rl.engines.vllm.adapter import completions_of, sampling_params, scores_of, scoring_params
from sapo_rl.engines.vllm.lora import ADAPTER_ID
from sapo_rl.processes import die_with_parent, imports_are_done, kill_group_on_hangup, streams

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Return numbers of tokens for CUDA graphs that leave no step of up to twice `max_num_seqs` tokens without one.

    A step that decodes as many sequences as it may is larger as soon as a prompt joins, for one that is done, or what
    an episode is told. vLLM pads a step to the next size captured, and by default runs steps above 512 tokens without
    a graph.
    """
    sizes = {1, 2, 4, *range(8, 257, 8), *range(272, max_num_seqs, 16), max_num_seqs}
    larger = {*range(max_num_seqs + 32, 2 * max_num_seqs, 32), 2 * max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs) + sorted(larger)


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
    if settings.lora_rank:
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": vllm_rank(settings.lora_rank),
            "lora_target_modules": list(settings.lora_modules),  # the others are computed as without adapters
        }
    if settings.device == "cpu":
        memory = int(settings.cpu_kv_cache_gb * 2**30)
        # Of a prompt read in two parts vLLM would rewind the seeded generator, which none on the CPU can do.
        whole = {"enable_chunked_prefill": False}
        return arguments | whole | {"enforce_eager": True, "kv_cache_memory_bytes": memory}
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
            found = known.load_model_cls()
            if settings.lora_rank and not getattr(found, "supports_lora", False):
                raise ValueError(f"model.lora.sync: vLLM takes no adapters for {name}; set merged")
            ModelRegistry.register_model(name, found)


class Running(NamedTuple):
    """A request under way."""

    call: int
    read: Callable[[Any], Any]
    """Makes the call's answer of vLLM's."""


class VllmProcess:
    """The methods that the parent may call, on one `vllm.LLM`."""

    def __init__(self, settings: EngineSettings) -> None:
        from vllm import LLM

        register(settings)
        imports_are_done()
        self.settings = settings
        self.running: dict[str, Running] = {}
        """By vLLM's name of the request."""
        self.names: dict[int, str] = {}
        """vLLM's name of what is under way for a call."""
        self.loads = 0
        self.adapter: LoRARequest | None = None
        """What has requests written with the adapters last loaded."""
        self.asleep = False
        self.layout: str | None = None
        """Of the weights that are loaded, or were when the engine went to sleep."""
        self.llm: LLM = LLM(**llm_arguments(settings))

    def add(self, call: int, request: Request, sampling: Sampling) -> None:
        """Put a request under way; `step` returns its completions."""
        params = sampling_params(request, sampling, self.settings.stop_token_ids)
        self._enqueue(call, request.token_ids, params, completions_of)

    def score(self, call: int, token_ids: list[int]) -> None:
        """See `Engine.score`; `step` returns the answer."""
        self._enqueue(call, token_ids, scoring_params(), scores_of)

    def _enqueue(self, call: int, token_ids: list[int], params: SamplingParams, read: Callable[[Any], Any]) -> None:
        if self.asleep:
            if self.layout is None:
                raise RuntimeError("the engine sleeps and never got weights to wake up with")
            self.load_weights(self.layout)  # sleep may have discarded them
        # What the cache holds of a prompt belongs to the weights that wrote it.
        salted: Any = {"prompt_token_ids": token_ids, "cache_salt": str(self.loads)}
        (name,) = self.llm.enqueue([salted], [params], lora_request=self.adapter, use_tqdm=False)
        name = name.partition("-")[0]  # outputs do not carry the random part
        self.running[name], self.names[call] = Running(call, read), name

    def step(self) -> list[Answer]:
        """Decode one token of each completion; return what this finished. A failure leaves vLLM dead."""
        try:
            outputs = [output for output in self.llm.llm_engine.step() if output.finished]
        except Exception as error:
            from vllm.v1.engine.exceptions import EngineDeadError

            raise EngineDeadError from error
        answers: list[Answer] = []
        for output in outputs:
            call, read = self.running.pop(output.request_id)
            del self.names[call]
            answers.append((call, "done", read(output)))
        return answers

    def drop(self, call: int) -> None:
        """End what is under way for a call, if anything is."""
        if (name := self.names.pop(call, None)) is not None:
            self.llm.llm_engine.abort_request([name])
            del self.running[name]

    def load_weights(self, layout: str) -> None:
        """See `LoadingEngine.load_weights`. Wakes up as far as needed."""
        self._receive("receive_shared", layout)
        self.layout = layout

    def stream_weights(self, layout: str, later: str | None) -> None:
        """See `LoadingEngine.stream_weights`. Wakes up as far as needed."""
        self._receive("receive_stream", layout)
        self.layout = later

    def _receive(self, method: str, layout: str) -> None:
        if self.asleep:
            self.llm.wake_up(["weights"])
        self.llm.collective_rpc(method, args=(layout,))
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
            self.asleep = False
        self.loads += 1
        if self.settings.lora_rank:
            from vllm.lora.request import LoRARequest

            self.adapter = LoRARequest("policy", ADAPTER_ID, "in memory")

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

    inbox: queue.SimpleQueue[list[Call]] = queue.SimpleQueue()
    # Read at all times: two processes that both wait for the other to take a message would wait for ever.
    threading.Thread(target=_read, args=(connection, inbox), name="inbox", daemon=True).start()
    closing = threading.Event()
    threading.Thread(target=_die_with_core, args=(closing,), name="core", daemon=True).start()
    connection.send([(0, "done", None)])
    while True:
        if server.running and inbox.empty():
            if answers := server.step():
                connection.send(answers)
            continue
        for call, method, arguments in inbox.get():
            if method == "close":
                closing.set()
                server.close()
                return
            try:
                if method in ("add", "score", "drop"):
                    getattr(server, method)(call, *arguments)
                else:
                    connection.send([(call, "done", getattr(server, method)(*arguments))])
            except EngineDeadError:
                raise
            except Exception:  # the same call would fail again in a new engine: tell, do not die
                traceback.print_exc()
                connection.send([(call, "failed", traceback.format_exc(limit=-4))])


def _die_with_core(closing: threading.Event) -> None:
    """End this process when vLLM's core process ends unasked: vLLM would wait for an answer of it for ever."""
    if cores := multiprocessing.active_children():  # none where the core is part of this process
        wait([core.sentinel for core in cores])
        if not closing.is_set():
            os._exit(1)


def _read(connection: Connection, inbox: queue.SimpleQueue[list[Call]]) -> None:
    """Until the parent is gone, which ends this process by other means."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())


def main() -> None:
    """Tie the process to its parent and serve it."""
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    gc.disable()
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
