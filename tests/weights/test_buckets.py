"""Weights through a small buffer: what arrives, what is kept for restarts, and engines that do not last."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import pytest
import torch

from sapo_rl.weights.buckets import BucketTransport, read_buckets
from sapo_rl.weights.file import FileTransport
from sapo_rl.weights.shared import open_blocks, open_layout

HALF = 4096
SHAPES = {"a": (3, 5), "empty": (0, 4), "large": (1000,), "scalar": (), "b": (300, 2), "c": (7, 50), "last": (990,)}


@dataclass
class Receiver:
    """An engine's receiving half."""

    dies_at: str = ""
    slow: float = 0.0
    asleep: bool = False
    weight_version: int = 0
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    later: str | None = None
    loads: int = 0
    error: str = ""
    weights_lock: Lock = field(default_factory=Lock)

    def stream_weights(self, layout: str, later: str | None, version: int) -> bool:
        assert self.weights_lock.locked()
        self.later = later
        if self.dies_at == "start":
            return False
        self.tensors = {}
        arriving = read_buckets(layout, open_blocks(json.loads(layout)), lambda: time.sleep(self.slow))
        try:
            for name, tensor in arriving:
                if name == self.dies_at:
                    arriving.close()  # type: ignore[attr-defined]
                    return False
                self.tensors[name] = tensor
        except EOFError:
            self.error = "the trainer gave up"
            raise
        self.weight_version = version
        return True

    def load_weights(self, layout: str, version: int) -> None:
        assert not self.weights_lock.locked()
        self.loads += 1
        self.weight_version = version
        self.tensors = {name: tensor.clone() for name, tensor in open_layout(layout)}


class Refusing(Receiver):
    def stream_weights(self, layout: str, later: str | None, version: int) -> bool:
        super().stream_weights(layout, later, version)
        raise RuntimeError("no such weight")


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("buffer", "files"):
        (tmp_path / name).mkdir()
    return tmp_path / "buffer", tmp_path / "files"


def make(folders: tuple[Path, Path], dtype: torch.dtype = torch.float32, keep: bool = True) -> BucketTransport:
    memory, files = (FileTransport(folder, dtype) for folder in folders)
    return BucketTransport(memory, files, HALF, keep)


def check(engine: Receiver, seed: int, dtype: torch.dtype = torch.float32) -> None:
    expected = weights(seed)
    assert list(engine.tensors) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(engine.tensors[name], tensor.to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_go_through_two_halves_into_every_engine(dtype: torch.dtype, folders: tuple[Path, Path]) -> None:
    transport, engines = make(folders, dtype), [Receiver(), Receiver(slow=0.02)]
    for version in (1, 2, 3):
        transport.push(weights(version).items(), engines, version)  # type: ignore[arg-type]
        for engine in engines:
            assert (engine.weight_version, engine.loads) == (version, 0)
            check(engine, version, dtype)
    assert sum(file.stat().st_size for file in folders[0].iterdir()) == 2 * HALF
    transport.close()
    transport.close()
    assert not any(folder.exists() for folder in folders)


def test_a_restarted_engine_gets_the_last_version_whole(folders: tuple[Path, Path]) -> None:
    transport, engine = make(folders), Receiver()
    for version in (1, 2):
        pushed = weights(version)
        transport.push(pushed.items(), [engine], version)  # type: ignore[list-item]
        for tensor in pushed.values():
            tensor.zero_()
        assert engine.later is not None
        engine.load_weights(engine.later, version)
        check(engine, version)
    transport.close()


def test_without_restarts_nothing_is_kept(folders: tuple[Path, Path]) -> None:
    transport, engine = make(folders, keep=False), Receiver()
    transport.push(weights(1).items(), [engine], 1)  # type: ignore[list-item]
    check(engine, 1)
    assert engine.later is None
    assert not list(folders[1].iterdir())
    transport.close()


@pytest.mark.parametrize("dies_at", ["start", "a", "b", "last"])
def test_an_engine_lost_on_the_way_gets_the_copy_and_does_not_stop_the_others(
    dies_at: str, folders: tuple[Path, Path]
) -> None:
    transport, engines = make(folders), [Receiver(dies_at=dies_at), Receiver()]
    transport.push(weights(1).items(), engines, 1)  # type: ignore[arg-type]
    assert [engine.loads for engine in engines] == [1, 0]
    for engine in engines:
        assert engine.weight_version == 1
        check(engine, 1)
    engines[0].dies_at = ""
    transport.push(weights(2).items(), engines, 2)  # type: ignore[arg-type]
    assert [engine.loads for engine in engines] == [1, 0]
    check(engines[0], 2)
    transport.close()


def test_push_raises_what_an_engine_raised(folders: tuple[Path, Path]) -> None:
    transport, engine = make(folders), Receiver()
    with pytest.raises(RuntimeError, match="no such weight"):
        transport.push(weights(1).items(), [engine, Refusing()], 1)  # type: ignore[list-item]
    check(engine, 1)
    assert not engine.weights_lock.locked()
    transport.close()


def test_engines_do_not_take_a_stream_that_breaks_off_for_a_whole(folders: tuple[Path, Path]) -> None:
    def breaks() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(weights(1).items())[:5]
        raise ValueError("out of memory")

    transport, engine = make(folders), Receiver()
    with pytest.raises(ValueError, match="out of memory"):
        transport.push(breaks(), [engine], 1)  # type: ignore[list-item]
    assert engine.error and engine.weight_version == 0
    transport.close()


def test_tensors_are_gathered_while_engines_read(folders: tuple[Path, Path]) -> None:
    """One bucket ahead, and no more: a bucket is written over only when all have read it."""
    transport, engine = make(folders), Receiver()
    begun: list[int] = []

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(12):
            begun.append(len(engine.tensors))
            yield f"layer.{index}", torch.full((HALF // 4,), float(index))  # each fills a half

    transport.push(gathered(), [engine], 1)  # type: ignore[list-item]
    assert [tensor[0].item() for tensor in engine.tensors.values()] == list(range(12))
    assert all(read >= index - 3 for index, read in enumerate(begun))
    transport.close()


def test_a_rank_without_engines_takes_part_and_keeps_nothing(folders: tuple[Path, Path]) -> None:
    transport, left = make(folders), iter(weights(0).items())
    transport.push(left, [], 1)
    assert next(left, None) is None
    assert not [*folders[0].iterdir(), *folders[1].iterdir()]
    transport.close()
