"""Weights by way of GPU memory that the engines on the same GPU map (CUDA IPC): no disk, no copy to the host.

The memory holds one copy of the weights in the engines' dtype and keeps it until the next push, so that an engine which
is restarted, or woken up, gets exactly the version that the others have, whatever the trainer does meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from sapo_rl.rollout.engine import Engine
from sapo_rl.rollout.weights.base import WeightTransport, make_room
from sapo_rl.rollout.weights.memory import SharedMemory

BLOCK_BYTES = 64 << 20
"""Tensors share blocks of this size; a larger one has a block of its own. The number of weights is not known at first:
a sharded trainer gathers them one by one."""
ALIGNMENT = 256
"""Each tensor starts at a multiple of this many bytes, as in memory from torch."""


class IpcTransport(WeightTransport):
    """Casts and copies the weights on the GPU, then has every engine load them from there.

    Engines must be on the current CUDA device of this process, and must be closed before the transport.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._blocks: list[SharedMemory] = []
        self._open: tuple[int, torch.Tensor] | None = None
        self._used = 0
        self._views: dict[str, torch.Tensor] = {}
        self._places: list[tuple[str, list[int], int, int]] = []
        self._layout = ""

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], engines: Sequence[Engine], version: int) -> None:
        """See `WeightTransport.push`. Raises what an engine raised; no engine may be in a call."""
        self.fill(named_tensors)
        make_room(engines)
        with ThreadPoolExecutor(len(engines)) as pool:
            list(pool.map(lambda engine: engine.load_shared(self._layout, version), engines))

    def fill(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy the weights into the shared memory and wait until they are there. Names and shapes never change."""
        for name, tensor in named_tensors:
            view = self._views.get(name)
            if view is None:
                view = self._place(name, tensor.shape)
                self._layout = ""
            view.copy_(tensor.detach())
        torch.cuda.current_stream().synchronize()
        if not self._layout:
            blocks = [(block.export().hex(), block.size) for block in self._blocks]
            dtype = str(self.dtype).removeprefix("torch.")
            self._layout = json.dumps({"dtype": dtype, "blocks": blocks, "tensors": self._places})

    def close(self) -> None:
        """Free the memory."""
        self._views, self._open = {}, None
        while self._blocks:
            self._blocks.pop().free()

    def _place(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Give a tensor its place; return a view of it."""
        size = -(-shape.numel() * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if size > BLOCK_BYTES:
            (index, memory), start = self._new_block(size), 0
        else:
            if self._open is None or self._used + size > BLOCK_BYTES:
                self._open, self._used = self._new_block(BLOCK_BYTES), 0
            (index, memory), start = self._open, self._used
            self._used += size
        self._places.append((name, list(shape), index, start))
        self._views[name] = view_of(memory, self.dtype, list(shape), start)
        return self._views[name]

    def _new_block(self, size: int) -> tuple[int, torch.Tensor]:
        self._blocks.append(SharedMemory.allocate(size))
        return len(self._blocks) - 1, self._blocks[-1].tensor()


def view_of(memory: torch.Tensor, dtype: torch.dtype, shape: list[int], start: int) -> torch.Tensor:
    """Return the tensor of `dtype` and `shape` that begins at byte `start` of a (size,) uint8 tensor."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return memory[start : start + size].view(dtype).view(shape)


def open_layout(layout: str) -> list[tuple[str, torch.Tensor]]:
    """Map the memory that another process described; return its tensors by name, in the order of the first push."""
    found = json.loads(layout)
    blocks = [SharedMemory.open(bytes.fromhex(handle), size).tensor() for handle, size in found["blocks"]]
    dtype = getattr(torch, found["dtype"])
    return [(name, view_of(blocks[index], dtype, shape, start)) for name, shape, index, start in found["tensors"]]
