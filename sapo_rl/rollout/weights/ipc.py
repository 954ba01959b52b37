"""Weights by way of GPU memory that the engines on the same GPU map (CUDA IPC): no disk, no copy to the host.

The memory holds one copy of the weights in the engines' dtype and keeps it until the next push, so that an engine which
is restarted, or woken up, gets exactly the version that the others have, whatever the trainer does meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from sapo_rl.rollout.engine import LoadingEngine
from sapo_rl.rollout.weights.base import WeightTransport, make_room
from sapo_rl.rollout.weights.blocks import WeightBlocks, view_of
from sapo_rl.rollout.weights.memory import SharedMemory


class IpcTransport(WeightTransport[LoadingEngine]):
    """Casts and copies the weights on the GPU, then has every engine load them from there.

    Engines must be on the current CUDA device of this process, and must be closed before the transport.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._memory: list[SharedMemory] = []
        self._blocks = WeightBlocks(dtype, self._allocate)
        self._layout = ""
        self._described = 0

    def push(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], engines: Sequence[LoadingEngine], version: int
    ) -> None:
        """See `WeightTransport.push`. Raises what an engine raised; no engine may be in a call."""
        self.fill(named_tensors)
        make_room(engines)
        with ThreadPoolExecutor(len(engines)) as pool:
            list(pool.map(lambda engine: engine.load_shared(self._layout, version), engines))

    def fill(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy the weights into the shared memory and wait until they are there. Names and shapes never change."""
        self._blocks.fill(named_tensors)
        torch.cuda.current_stream().synchronize()
        if len(self._blocks.places) != self._described:
            blocks = [(block.export().hex(), block.size) for block in self._memory]
            self._layout = json.dumps(self._blocks.layout() | {"blocks": blocks})
            self._described = len(self._blocks.places)

    def close(self) -> None:
        """Free the memory."""
        self._blocks.free()
        while self._memory:
            self._memory.pop().free()

    def _allocate(self, size: int) -> torch.Tensor:
        self._memory.append(SharedMemory.allocate(size))
        return self._memory[-1].tensor()


def open_layout(layout: str) -> list[tuple[str, torch.Tensor]]:
    """Map the memory that another process described; return its tensors by name, in the order of the first push."""
    found = json.loads(layout)
    blocks = [SharedMemory.open(bytes.fromhex(handle), size).tensor() for handle, size in found["blocks"]]
    dtype = getattr(torch, found["dtype"])
    return [(name, view_of(blocks[index], dtype, shape, start)) for name, shape, index, start in found["tensors"]]
