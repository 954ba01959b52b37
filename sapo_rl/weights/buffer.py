"""The weights in one dtype, in few large blocks of memory: a copy that stays as it is while the trainer goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

BLOCK_BYTES = 64 << 20
"""Tensors share blocks of this size; a larger one has a block of its own. The number of weights is not known at first:
a sharded trainer gathers them one by one."""
ALIGNMENT = 256
"""Each tensor starts at a multiple of this many bytes, as in memory from torch."""

Place = tuple[str, list[int], int, int]
"""A tensor's name, its shape, the index of its block, and the byte of the block at which it starts."""


class WeightBlocks:
    """Keeps each tensor at a place of its own, found at the first `fill` and the same from then on.

    Args:
        dtype: of all tensors in the blocks.
        allocate: gives a block of that many bytes, a (size,) uint8 tensor.
    """

    def __init__(self, dtype: torch.dtype, allocate: Callable[[int], torch.Tensor]) -> None:
        self.dtype = dtype
        self.blocks: list[torch.Tensor] = []
        self.places: list[Place] = []
        self._allocate = allocate
        self._views: dict[str, torch.Tensor] = {}
        self._open = -1
        self._used = 0

    def fill(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Cast and copy the tensors, in the current CUDA stream. Names and shapes never change."""
        for name, tensor in named_tensors:
            view = self._views.get(name)
            if view is None:
                view = self._place(name, tensor.shape)
            view.copy_(tensor.detach())

    def layout(self) -> dict[str, Any]:
        """Return what `open_layout` needs beside the blocks; made of what JSON knows."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "tensors": self.places}

    def free(self) -> None:
        """Forget the blocks."""
        self.blocks, self.places, self._views, self._open = [], [], {}, -1

    def _place(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Give a tensor its place; return a view of it."""
        size = aligned(shape.numel(), self.dtype)
        if size > BLOCK_BYTES:
            block, start = self._new_block(size), 0
        else:
            if self._open < 0 or self._used + size > BLOCK_BYTES:
                self._open, self._used = self._new_block(BLOCK_BYTES), 0
            block, start = self._open, self._used
            self._used += size
        self.places.append((name, list(shape), block, start))
        self._views[name] = view_of(self.blocks[block], self.dtype, list(shape), start)
        return self._views[name]

    def _new_block(self, size: int) -> int:
        self.blocks.append(self._allocate(size))
        return len(self.blocks) - 1


def aligned(elements: int, dtype: torch.dtype) -> int:
    """Return the bytes of so many elements, rounded up to `ALIGNMENT`."""
    return -(-elements * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def view_of(memory: torch.Tensor, dtype: torch.dtype, shape: list[int], start: int) -> torch.Tensor:
    """Return the tensor of `dtype` and `shape` that begins at byte `start` of a (size,) uint8 tensor."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return memory[start : start + size].view(dtype).view(shape)
