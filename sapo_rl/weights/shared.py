"""Weights by way of memory that the engines on this machine map, written to the same places at every push.

The memory holds one copy of the weights in the engines' dtype and keeps it until the next push, so that an engine which
is restarted, or woken up, gets exactly the version that the others have, whatever the trainer does meanwhile.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sapo_rl.processes import at_once
from sapo_rl.weights.base import WeightTransport, gather_only, holding, make_room, settle
from sapo_rl.weights.buffer import WeightBlocks, view_of
from sapo_rl.weights.memory import SharedMemory

if TYPE_CHECKING:
    from sapo_rl.engines.base import LoadingEngine


class SharedTransport(WeightTransport["LoadingEngine"]):
    """Casts and copies the weights into its memory, then has every engine load them from there.

    Engines must be closed before the transport.
    """

    kind: str
    """How `open_layout` maps the blocks."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._blocks = WeightBlocks(dtype, self.allocate)
        self._layout = ""
        self._described = 0

    @abstractmethod
    def allocate(self, size: int) -> torch.Tensor:
        """Return a new block, a (size,) uint8 tensor."""

    @abstractmethod
    def handles(self) -> list[str]:
        """Return what another process maps each block by."""

    def push(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], engines: Sequence[LoadingEngine], version: int
    ) -> None:
        """See `WeightTransport.push`. Raises what an engine raised."""
        if not engines:  # another rank's engine has this device
            gather_only(named_tensors)
            return
        with holding(engines):
            self.fill(named_tensors)
        make_room(engines)
        at_once([partial(engine.load_weights, self._layout, version) for engine in engines])

    def fill(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy the weights into the memory and wait until they are there. Names and shapes never change."""
        self._blocks.fill(named_tensors)
        settle()
        if len(self._blocks.places) != self._described:
            blocks = list(zip(self.handles(), map(len, self._blocks.blocks), strict=True))
            self._layout = json.dumps(self._blocks.layout() | {"kind": self.kind, "blocks": blocks})
            self._described = len(self._blocks.places)

    def close(self) -> None:
        """Forget the blocks; those who allocate them free them."""
        self._blocks.free()


def open_layout(layout: str) -> list[tuple[str, torch.Tensor]]:
    """Map the memory that another process described; return its tensors by name, in the order of the first push."""
    found = json.loads(layout)
    if "index" in found:  # in a file: it was not known yet when the layout was given
        found = json.loads(Path(found["index"]).read_text(encoding="utf-8"))
    dtype = getattr(torch, found["dtype"])
    blocks = open_blocks(found)
    return [(name, view_of(blocks[index], dtype, shape, start)) for name, shape, index, start in found["tensors"]]


def open_blocks(found: dict[str, Any]) -> list[torch.Tensor]:
    """Map the blocks of a layout."""
    open_block = {"gpu": _open_gpu, "host": map_file}[found["kind"]]
    return [open_block(handle, size) for handle, size in found["blocks"]]


def map_file(path: str | Path, size: int) -> torch.Tensor:
    """Return a file's first bytes as a (size,) uint8 tensor: whoever maps the file sees what is written to it."""
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def _open_gpu(handle: str, size: int) -> torch.Tensor:
    return SharedMemory.open(bytes.fromhex(handle), size).tensor()
