"""Weights in a file: what is written, who reads it, what is left."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sapo_rl.errors import UserError
from sapo_rl.rollout.weights.file import ABANDONED_AFTER, PREFIX, FileTransport, weights_folder
from sapo_rl.tensor_file import write_tensors


@dataclass
class Reader:
    """An engine's receiving half: it reads the file that it is told of."""

    weight_version: int = 0
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    path: Path = Path()
    asleep: bool = False

    def load_weights(self, path: Path, version: int) -> None:
        self.path, self.weight_version, self.tensors = path, version, load_file(path)


class Refusing(Reader):
    def load_weights(self, path: Path, version: int) -> None:
        raise RuntimeError("no room")


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (3, 5), "b.weight": (7,), "scalar": (), "empty": (0, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_holds_the_tensors_in_the_engines_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = tensors(0) | {"transposed": torch.arange(6.0).reshape(2, 3).T}
    weights["grad"] = torch.ones(2, requires_grad=True)
    write_tensors(tmp_path / "1.safetensors", weights.items(), dtype)
    found = load_file(tmp_path / "1.safetensors")
    assert list(found) and set(found) == set(weights)
    for name, tensor in weights.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.detach().to(dtype)), name
    assert [path.name for path in tmp_path.iterdir()] == ["1.safetensors"]


def test_tensors_are_taken_one_at_a_time(tmp_path: Path) -> None:
    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        buffer = torch.empty(4)  # a sharded trainer reuses its buffer: the file must not depend on it afterwards
        for i in range(3):
            yield f"layer.{i}", buffer.fill_(i)

    write_tensors(tmp_path / "1.safetensors", gathered(), torch.float32)
    found = load_file(tmp_path / "1.safetensors")
    assert [found[f"layer.{i}"].tolist() for i in range(3)] == [[0.0] * 4, [1.0] * 4, [2.0] * 4]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "1.safetensors"
    write_tensors(path, tensors(0).items(), torch.float32)

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a.weight", torch.zeros(3, 5)
        raise RuntimeError("gather failed")

    with pytest.raises(RuntimeError, match="gather failed"):
        write_tensors(path, broken(), torch.float32)
    assert torch.equal(load_file(path)["a.weight"], tensors(0)["a.weight"])


def test_push_reaches_every_engine_and_keeps_the_newest_file_only(tmp_path: Path) -> None:
    engines = [Reader(), Reader()]
    transport = FileTransport(tmp_path, torch.float32)
    for version in (1, 2, 3):
        transport.push(tensors(version).items(), engines, version)
        for engine in engines:
            assert engine.weight_version == version
            assert torch.equal(engine.tensors["b.weight"], tensors(version)["b.weight"])
        assert list(tmp_path.iterdir()) == [engines[0].path]
    transport.close()
    transport.close()
    assert not tmp_path.exists()


def test_push_raises_what_an_engine_raised(tmp_path: Path) -> None:
    transport = FileTransport(tmp_path, torch.float32)
    reader = Reader()
    transport.push(tensors(1).items(), [reader], 1)
    with pytest.raises(RuntimeError, match="no room"):
        transport.push(tensors(2).items(), [reader, Refusing()], 2)
    assert reader.path.exists()  # the engine that took them may still have to be restarted
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
    folders = {name: tmp_path / f"{PREFIX}{name}" for name in ("abandoned", "live", "new", "killed")}
    for folder in folders.values():
        folder.mkdir()
    hold = (
        "import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_SH);"
        " print(flush=True); time.sleep(60)"
    )
    killed = subprocess.Popen([sys.executable, "-c", hold, str(folders["killed"])], stdout=subprocess.PIPE)
    assert killed.stdout is not None
    killed.stdout.readline()
    transport = FileTransport(folders["live"], torch.float32)
    transport.push(tensors(1).items(), [Reader()], 1)
    long_ago = time.time() - 2 * ABANDONED_AFTER
    for name in ("abandoned", "live", "killed"):
        os.utime(folders[name], (long_ago, long_ago))

    weights_folder(1, tmp_path)
    assert [name for name, folder in folders.items() if folder.exists()] == ["live", "new", "killed"]
    killed.kill()
    killed.wait()
    weights_folder(1, tmp_path)
    assert [name for name, folder in folders.items() if folder.exists()] == ["live", "new"]
    assert (folders["live"] / "1.safetensors").exists()
    transport.close()


def test_the_owner_holds_a_lock(tmp_path: Path) -> None:
    transport = FileTransport(tmp_path, torch.float32)
    other = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    transport.close()
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
