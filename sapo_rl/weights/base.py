"""The one thing a weight transport does: bring the trainer's weights into every engine.

`file` (files in shared memory) and `ipc` (memory of a GPU) are mapped by trainer and engines; `nccl` broadcasts to
servers on other GPUs and hosts. All read `named_tensors` lazily, in its order, so that a sharded trainer can gather one
tensor at a time.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

if TYPE_CHECKING:
    from sapo_rl.engines.base import Engine, LoadingEngine

EngineT = TypeVar("EngineT", bound="Engine", contravariant=True)


class WeightTransport(ABC, Generic[EngineT]):
    """Brings weights into engines of the kind that it knows how to reach."""

    @abstractmethod
    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], engines: Sequence[EngineT], version: int) -> None:
        """Load the tensors (named as in the checkpoint, any float dtype, any device) into every engine as `version`.

        The iterable is read once, in its order. When `push` returns, the tensors may change: no engine refers to them.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what the transport holds; more calls do nothing. Engines must not be restarted after it."""


def gather_only(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Read the tensors and keep none: all ranks gather the weights together, also one that brings them nowhere."""
    deque(named_tensors, maxlen=0)


@contextlib.contextmanager
def holding(engines: Sequence[LoadingEngine]) -> Iterator[None]:
    """Hold the `weights_lock` of every engine, so that none is started anew with weights that are being replaced."""
    with contextlib.ExitStack() as stack:
        for engine in engines:
            stack.enter_context(engine.weights_lock)
        yield


def settle() -> None:
    """Wait until what was asked of the current CUDA stream is done."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def make_room(engines: Sequence[Engine]) -> None:
    """Return the GPU memory that torch only keeps for later use, where sleeping engines are about to take theirs."""
    if torch.cuda.is_available() and any(engine.asleep for engine in engines):
        torch.cuda.empty_cache()
