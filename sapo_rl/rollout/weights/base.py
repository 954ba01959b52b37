"""The one thing a weight transport does: bring the trainer's weights into every engine.

`file` (safetensors in shared memory) works on every device and is what there is now. Two more fit the same interface:
`ipc` hands CUDA memory handles of one bucket of tensors after the other to engines on the same GPU, and `nccl`
broadcasts such buckets to engines on other GPUs and hosts. Both read `named_tensors` lazily, in its order, so that a
sharded trainer can gather one bucket at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sapo_rl.rollout.engine import Engine

if TYPE_CHECKING:
    import torch


class WeightTransport(ABC):
    """Brings weights into engines."""

    @abstractmethod
    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], engines: Sequence[Engine], version: int) -> None:
        """Load the tensors (named as in the checkpoint, any float dtype, any device) into every engine as `version`.

        The iterable is read once, in its order. When `push` returns, the tensors may change: no engine refers to them.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what the transport holds; more calls do nothing. Engines must not be restarted after it."""
