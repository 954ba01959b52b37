"""The child process that holds vLLM: `python -m sapo_rl.rollout.child SOCKET_FD PARENT_PID`, started by `LocalEngine`.

It receives `EngineSettings`, builds the engine, sends `("ready", None)`, and then answers each `(method, arguments)`
with `("done", result)` or `("failed", traceback)`. A dead vLLM core ends this process, for its parent to restart.
"""

from __future__ import annotations

import os
import sys
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from sapo_rl.rollout.engine import Completion, EngineSettings, Request, Sampling
from sapo_rl.rollout.lifeline import die_with_parent, kill_group_on_hangup

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput
    from vllm.logprobs import FlatLogprobs


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
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # else the model's own sampling defaults would creep in
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from, not before temperature
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "worker_extension_cls": "sapo_rl.rollout.worker.WeightReceiver",
    }
    if settings.device == "cpu":
        memory = int(settings.cpu_kv_cache_gb * 2**30)
        return arguments | {"enforce_eager": True, "kv_cache_memory_bytes": memory}
    return arguments | {
        "enforce_eager": settings.enforce_eager,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "disable_cascade_attn": True,  # gives other log-probs than the plain kernels on some GPUs
        "compilation_config": {"cudagraph_capture_sizes": capture_sizes(settings.max_num_seqs)},
    }


class Server:
    """The methods that the parent may call, on one `vllm.LLM`."""

    def __init__(self, settings: EngineSettings) -> None:
        from vllm import LLM

        self.stop_token_ids = settings.stop_token_ids
        self.llm: LLM = LLM(**llm_arguments(settings))

    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        """See `Engine.generate`."""
        from vllm import SamplingParams

        common = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "max_tokens": sampling.max_tokens,
            "logprobs": 0 if sampling.logprobs else None,
            "flat_logprobs": sampling.logprobs,
            "stop_token_ids": self.stop_token_ids,
            "detokenize": False,
        }
        outputs = self.llm.generate(
            [{"prompt_token_ids": request.token_ids} for request in requests],
            [SamplingParams(n=request.n, seed=request.seed, **common) for request in requests],
            use_tqdm=False,
        )
        return [_completions(output) for output in outputs]

    def load_weights(self, path: str) -> None:
        """Replace the weights; what the prefix cache holds belongs to the old ones."""
        self.llm.collective_rpc("receive_file", args=(path,))
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")

    def score(self, token_ids: list[int]) -> list[float]:
        """See `Engine.score`."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        (output,) = self.llm.generate([{"prompt_token_ids": token_ids}], params, use_tqdm=False)
        positions = output.prompt_logprobs or []
        return [entry[token].logprob for token, entry in zip(token_ids, positions, strict=True) if entry]

    def close(self) -> None:
        """Stop vLLM's core process, where it has one."""
        self.llm.llm_engine.engine_core.shutdown()


def _completions(output: RequestOutput) -> list[Completion]:
    from vllm.logprobs import FlatLogprobs

    return [
        Completion(
            token_ids=list(one.token_ids),
            truncated=one.finish_reason == "length",
            logps=_sampled(one.logprobs) if isinstance(one.logprobs, FlatLogprobs) else None,
        )
        for one in output.outputs
    ]


def _sampled(flat: FlatLogprobs) -> list[float]:
    """The first entry of each position is the sampled token's."""
    return [flat.logprobs[start] for start in flat.start_indices]


def serve(connection: Connection) -> None:
    """Answer the parent's messages until it asks to close."""
    server = Server(connection.recv())
    from vllm.v1.engine.exceptions import EngineDeadError

    connection.send(("ready", None))
    while True:
        method, arguments = connection.recv()
        if method == "close":
            server.close()
            return
        try:
            reply = ("done", getattr(server, method)(*arguments))
        except EngineDeadError:
            raise
        except Exception:  # the same call would fail again in a new engine: tell, do not die
            traceback.print_exc()
            reply = ("failed", traceback.format_exc(limit=-4))
        connection.send(reply)


def main() -> None:
    """Tie the process to its parent and serve it."""
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    os.set_inheritable(fd, False)
    kill_group_on_hangup(fd)
    serve(Connection(fd))
    sys.stdout.flush()
    os._exit(0)  # vLLM is shut down; Python's own tidying up would take seconds


if __name__ == "__main__":
    main()
