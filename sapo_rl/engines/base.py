"""What an inference engine is asked, answers and promises. Imports neither torch nor vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how many completions of it.

    Example:
        >>> Request([1, 52, 28], n=8).seed is None
        True
    """

    token_ids: list[int]
    """The prompt."""
    n: int
    """Completions to sample."""
    seed: int | None = None
    """Seeds these completions: vLLM takes seed, seed + 1, ... for the n of them. None draws from the engine's own."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion of a request.

    Example:
        >>> completion = Completion([34, 2], truncated=False, logps=[-0.25, -0.01])
        >>> sum(completion.logps)
        -0.26
    """

    token_ids: list[int]
    """Completion tokens, the end-of-sequence token included where one was produced."""
    truncated: bool
    """True where the length limit ended it."""
    logps: list[float] | None = None
    """Log-probability of each token under the distribution it was sampled from (after temperature and filters)."""
    cached: int = 0
    """Tokens of the prompt that the engine's cache held, so that they were not computed again."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the completions of one call are drawn.

    Example:
        >>> Sampling(
        ...     temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, max_tokens=512, logprobs=False
        ... ).max_tokens
        512
    """

    temperature: float
    """0 is greedy."""
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    max_tokens: int
    """A completion is cut there."""
    logprobs: bool
    """Return `Completion.logps`."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """One engine. The fields not explained here are those of `RolloutConfig` and `ModelConfig`."""

    model: str
    dtype: str
    max_model_len: int
    """Prompt and completion tokens together, at most."""
    max_num_seqs: int
    gpu_memory_utilization: float
    cpu_kv_cache_gb: float
    enforce_eager: bool
    stop_token_ids: list[int]
    """Every token that ends a sequence: the engine knows no tokenizer."""
    seed: int
    """Seeds the engine's own stream; give each engine of a run another."""
    device: str
    """`cpu`, or `cuda:<index>` among the devices that this process sees."""
    trust_remote_code: bool
    revision: str | None
    start_timeout: float
    timeout: float
    max_restarts: int
    log_path: Path
    """What the engine prints is appended there."""
    tensor_parallel: int = 1
    """Devices over which the model is spread, `device` and those after it."""
    kv_cache_bytes: int | None = None
    """Size of the key-value cache on a GPU; None lets vLLM measure what `gpu_memory_utilization` leaves: no other
    process may then take or free memory of that GPU during the start."""
    sleep_level: int = 0
    """What `Engine.sleep` frees: 0 nothing, 1 the cache (the weights move to the host), 2 cache and weights."""
    core_process: bool = False
    """Whether vLLM's core gets a process of its own, beside the one that passes requests in and completions out."""
    lora_rank: int = 0
    """Of adapters that are loaded in place of weights; 0 where weights are."""
    lora_modules: tuple[str, ...] = ()
    """Last parts of the names of the modules that have adapters."""


class Engine(Protocol):
    """Generates with the weights last loaded. Several threads may call it."""

    weight_version: int
    """Version given with the weights last loaded; 0 for those in the model's folder."""
    restarts: int
    """How often the engine was started anew."""
    asleep: bool
    """True from `sleep` to the next call, which wakes the engine up."""

    def start(self) -> None:
        """Start the engine, where this process is the one that does, and return at once."""
        ...

    def wait_ready(self) -> None:
        """Return once the engine can be called."""
        ...

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> list[Future[list[Completion]]]:
        """Return at once with a future of each request's completions; the engine takes up all of these together.

        How many it has is for the caller to limit (`rollout/dispatch.py`). A future that is cancelled ends its request;
        one fails with EngineLost where the engine cannot be reached, with another error where it refuses the request.
        """
        ...

    def recover(self) -> None:
        """Return once an engine that was lost can be called again; at once, where it can be.

        Raises:
            EngineLost: it is still away; ask again later.
            EngineError: it will not come back.
        """
        ...

    def score(self, token_ids: list[int]) -> list[float]:
        """Return log p(token | those before it) at temperature 1, for each token but the first.

        Raises:
            EngineLost: the engine cannot be reached.
        """
        ...

    def sleep(self) -> None:
        """Free the GPU's memory as far as `EngineSettings.sleep_level` says; the next call takes it again.

        That call loads the weights last loaded, where it brings none itself: load some before the first sleep.
        """
        ...

    def close(self) -> None:
        """Stop the engine and free what it holds; more calls of `close` do nothing."""
        ...


class LoadingEngine(Engine, Protocol):
    """An engine on this machine, which can be told where to load weights from.

    Requests go on while weights are loaded, and what they write from then on is by those.
    """

    weights_lock: Lock
    """Held while the weight buffer is rewritten or weights stream: a restart must not load half-written weights."""

    def load_weights(self, layout: str, version: int) -> None:
        """Replace the weights by those in memory that `layout` describes, unchanged until the next are loaded."""
        ...

    def stream_weights(self, layout: str, later: str | None, version: int) -> bool:
        """Replace the weights by those that arrive through the buffer that `layout` describes.

        `later` describes memory from which they can be loaded once `weights_lock` is free again, None where there is
        none.
        Returns whether they are loaded; not where the engine was lost: the next call restarts it.
        """
        ...


def failed(error: Exception) -> Future[Any]:
    """Return a future that has failed with `error`."""
    future: Future[Any] = Future()
    future.set_exception(error)
    return future
