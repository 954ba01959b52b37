"""Where weights lie in memory that is shared; the memory itself is tested on a GPU."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from sapo_rl.rollout.weights import ipc
from sapo_rl.rollout.weights.blocks import ALIGNMENT, BLOCK_BYTES
from sapo_rl.rollout.weights.ipc import IpcTransport, open_layout


class HostMemory:
    """Memory of this process, found again by its handle; CUDA's can be had on a GPU only."""

    known: dict[bytes, torch.Tensor] = {}  # noqa: RUF012

    def __init__(self, handle: bytes, size: int) -> None:
        self.handle, self.size = handle, size

    @classmethod
    def allocate(cls, size: int) -> HostMemory:
        handle = len(cls.known).to_bytes(4, "big")
        cls.known[handle] = torch.full((size,), 255, dtype=torch.uint8)
        return cls(handle, size)

    @classmethod
    def open(cls, handle: bytes, size: int) -> HostMemory:
        assert len(cls.known[handle]) == size
        return cls(handle, size)

    def export(self) -> bytes:
        return self.handle

    def tensor(self) -> torch.Tensor:
        return self.known[self.handle]

    def free(self) -> None:
        del self.known[self.handle]


@dataclass
class Receiver:
    """An engine's receiving half."""

    asleep: bool = False
    weight_version: int = 0
    layouts: list[str] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def load_shared(self, layout: str, version: int) -> None:
        self.layouts.append(layout)
        self.weight_version = version
        self.tensors = {name: tensor.clone() for name, tensor in open_layout(layout)}


@pytest.fixture(autouse=True)
def host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def synchronize(self) -> None:
            pass

    HostMemory.known.clear()
    monkeypatch.setattr(ipc, "SharedMemory", HostMemory)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"a": (3, 5), "b": (7,), "big": (BLOCK_BYTES // 4 + 1, 1), "scalar": ()}
    shapes |= {"empty": (0, 4), "half": (BLOCK_BYTES // 4, 2), "most": (BLOCK_BYTES // 2 - 4,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_engine_reads_the_weights_in_its_dtype(dtype: torch.dtype) -> None:
    transport, engines = IpcTransport(dtype), [Receiver(), Receiver()]
    for version in (1, 2):
        pushed = weights(version) | {"transposed": torch.arange(6.0).reshape(2, 3).T}
        transport.push(pushed.items(), engines, version)  # type: ignore[arg-type]
        for engine in engines:
            assert engine.weight_version == version
            assert list(engine.tensors) == list(pushed)
            for name, tensor in pushed.items():
                assert engine.tensors[name].dtype == dtype
                assert torch.equal(engine.tensors[name], tensor.to(dtype)), name
    assert len({layout for engine in engines for layout in engine.layouts}) == 1  # nothing new to map
    transport.close()
    transport.close()
    assert not HostMemory.known


def test_tensors_lie_apart_and_aligned_in_few_blocks() -> None:
    transport, engine = IpcTransport(torch.bfloat16), Receiver()
    transport.push(weights(0).items(), [engine], 1)  # type: ignore[arg-type]
    layout: dict[str, Any] = json.loads(engine.layouts[0])
    taken: dict[int, list[tuple[int, int]]] = {}
    for _, shape, block, start in layout["tensors"]:
        assert start % ALIGNMENT == 0
        taken.setdefault(block, []).append((start, start + 2 * torch.Size(shape).numel()))
    for block, ranges in taken.items():
        ranges.sort()
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))
        assert ranges[-1][1] <= layout["blocks"][block][1]
    held = sum(size for _, size in layout["blocks"])
    assert held <= sum(2 * tensor.numel() for tensor in weights(0).values()) + 2 * BLOCK_BYTES


def test_the_trainer_may_change_its_weights_after_a_push() -> None:
    transport, engine = IpcTransport(torch.float32), Receiver()
    weight = torch.ones(4)
    transport.push([("w", weight)], [engine], 1)  # type: ignore[list-item]
    weight.fill_(2)
    engine.load_shared(engine.layouts[0], 1)  # as after a restart
    assert engine.tensors["w"].tolist() == [1.0] * 4
