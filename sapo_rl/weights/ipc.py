"""Weights by way of GPU memory that the engines on the same GPU map (CUDA IPC): no disk, no copy to the host."""

from __future__ import annotations

import torch

from sapo_rl.weights.memory import SharedMemory
from sapo_rl.weights.shared import SharedTransport


class IpcTransport(SharedTransport):
    """Keeps the weights on the current CUDA device of this process, on which the engines must be as well."""

    kind = "gpu"

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self._memory: list[SharedMemory] = []

    def allocate(self, size: int) -> torch.Tensor:
        """See `SharedTransport.allocate`. Raises torch.OutOfMemoryError."""
        self._memory.append(SharedMemory.allocate(size))
        return self._memory[-1].tensor()

    def handles(self) -> list[str]:
        """See `SharedTransport.handles`."""
        return [block.export().hex() for block in self._memory]

    def close(self) -> None:
        """Free the memory."""
        super().close()
        while self._memory:
            self._memory.pop().free()
