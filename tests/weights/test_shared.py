"""Weights in shared memory: where they lie, who reads them, what is left."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch

from sapo_rl.errors import UserError
from sapo_rl.weights import buffer
from sapo_rl.weights.buffer import ALIGNMENT
from sapo_rl.weights.file import FileTransport, weights_folder
from sapo_rl.weights.shared import open_layout

BLOCK_BYTES = 1 << 20


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte each, so that tensors of half a block are soon written."""
    monkeypatch.setattr(buffer, "BLOCK_BYTES", BLOCK_BYTES)


small = pytest.mark.usefixtures("small_blocks")


@dataclass
class Receiver:
    """An engine's receiving half."""

    asleep: bool = False
    weight_version: int = 0
    layouts: list[str] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    weights_lock: Lock = field(default_factory=Lock)

    def load_weights(self, layout: str, version: int) -> None:
        assert not self.weights_lock.locked()
        self.layouts.append(layout)
        self.weight_version = version
        self.tensors = {name: tensor.clone() for name, tensor in open_layout(layout)}


class Refusing(Receiver):
    def load_weights(self, layout: str, version: int) -> None:
        raise RuntimeError("no room")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.mkdir()
    return path


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"a": (3, 5), "b": (7,), "big": (BLOCK_BYTES // 4 + 1, 1), "scalar": ()}
    shapes |= {"empty": (0, 4), "half": (BLOCK_BYTES // 4, 2), "most": (BLOCK_BYTES // 2 - 4,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@small
def test_no_engine_is_restarted_from_weights_that_are_half_written(folder: Path) -> None:
    transport, engines = FileTransport(folder, torch.float32), [Receiver(), Receiver()]

    def pushed() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights(1).items():
            assert all(engine.weights_lock.locked() for engine in engines)
            yield name, tensor

    transport.push(pushed(), engines, 1)  # type: ignore[arg-type]
    assert [engine.weight_version for engine in engines] == [1, 1]
    transport.close()


@small
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_engine_reads_the_weights_in_its_dtype(dtype: torch.dtype, folder: Path) -> None:
    transport, engines = FileTransport(folder, dtype), [Receiver(), Receiver()]
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
    assert not folder.exists()


@small
def test_tensors_lie_apart_and_aligned_in_few_blocks(folder: Path) -> None:
    transport, engine = FileTransport(folder, torch.bfloat16), Receiver()
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
    transport.close()


def test_the_trainer_may_change_its_weights_after_a_push(folder: Path) -> None:
    transport, engine = FileTransport(folder, torch.float32), Receiver()
    weight = torch.ones(4)
    transport.push([("w", weight)], [engine], 1)  # type: ignore[list-item]
    weight.fill_(2)
    engine.load_weights(engine.layouts[0], 1)  # as after a restart
    assert engine.tensors["w"].tolist() == [1.0] * 4
    transport.close()


def test_tensors_are_taken_one_at_a_time(folder: Path) -> None:
    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        buffer = torch.empty(4)  # a sharded trainer reuses its buffer: what is kept must not depend on it afterwards
        for i in range(3):
            yield f"layer.{i}", buffer.fill_(i)

    transport, engine = FileTransport(folder, torch.float32), Receiver()
    transport.push(gathered(), [engine], 1)  # type: ignore[list-item]
    assert [engine.tensors[f"layer.{i}"].tolist() for i in range(3)] == [[0.0] * 4, [1.0] * 4, [2.0] * 4]
    transport.close()


@small
def test_a_rank_without_engines_takes_part_and_keeps_nothing(folder: Path) -> None:
    transport = FileTransport(folder, torch.float32)
    left = iter(weights(0).items())
    transport.push(left, [], 1)
    assert next(left, None) is None
    assert not list(folder.iterdir())
    transport.close()


def test_push_raises_what_an_engine_raised_and_others_can_be_restarted(folder: Path) -> None:
    transport, engine = FileTransport(folder, torch.float32), Receiver()
    with pytest.raises(RuntimeError, match="no room"):
        transport.push([("w", torch.ones(4))], [engine, Refusing()], 1)  # type: ignore[list-item]
    engine.load_weights(engine.layouts[0], 1)
    assert engine.tensors["w"].tolist() == [1.0] * 4
    transport.close()


def test_a_full_disk_is_an_error_and_no_dead_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    transport = FileTransport(folder, torch.float32)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"64 MiB.*No space left"):
        transport.push([("w", torch.ones(4))], [Receiver()], 1)  # type: ignore[list-item]
    transport.close()


def test_folder_goes_to_shared_memory_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, fallback = tmp_path / "shm", tmp_path / "tmp"
    shared.mkdir()
    fallback.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(fallback))
    assert weights_folder(1000, shared).parent == shared
    assert weights_folder(1000, tmp_path / "missing").parent == fallback
    with pytest.raises(UserError, match="GiB"):
        weights_folder(1 << 60, shared)


def test_folders_of_killed_runs_are_deleted_and_those_of_live_runs_kept(tmp_path: Path) -> None:
    folders = {name: tmp_path / f"sapo-weights-{name}" for name in ("abandoned", "live", "killed")}
    for folder in folders.values():
        folder.mkdir()
    hold = (
        "import sys, time, torch; from pathlib import Path; from sapo_rl.weights.file import FileTransport;"
        " held = FileTransport(Path(sys.argv[1]), torch.float32); print(flush=True); time.sleep(60)"
    )
    killed = subprocess.Popen([sys.executable, "-c", hold, str(folders["killed"])], stdout=subprocess.PIPE)
    assert killed.stdout is not None
    killed.stdout.readline()
    transport = FileTransport(folders["live"], torch.float32)
    transport.push([("w", torch.ones(4))], [Receiver()], 1)  # type: ignore[list-item]

    made = weights_folder(1, tmp_path)
    assert [name for name, folder in folders.items() if folder.exists()] == ["live", "killed"]
    killed.kill()
    killed.wait()
    made.rmdir()
    weights_folder(1, tmp_path)
    assert [name for name, folder in folders.items() if folder.exists()] == ["live"]
    assert list(folders["live"].iterdir())
    transport.close()


def test_what_others_put_under_the_name_neither_stops_a_start_nor_is_touched(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "kept").touch()
    os.mkfifo(tmp_path / "sapo-weights-pipe")
    (tmp_path / "sapo-weights-link").symlink_to(tmp_path / "target")
    (tmp_path / "sapo-weights-file").touch()
    make = (
        "import sys, pathlib; from sapo_rl.weights.file import weights_folder;"
        " weights_folder(1, pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", make, str(tmp_path)], check=True, timeout=120)
    assert (tmp_path / "target" / "kept").exists()
    assert len(list(tmp_path.glob("sapo-weights-*"))) == 4


def test_a_folder_that_was_swept_before_it_had_an_owner_is_made_again(tmp_path: Path) -> None:
    folder = weights_folder(1, tmp_path)
    weights_folder(1, tmp_path)
    assert not folder.exists()
    transport = FileTransport(folder, torch.float32)
    weights_folder(1, tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    transport.close()
    assert not folder.exists()


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OSError):
        FileTransport(tmp_path / "link", torch.float32)
