"""Weights by way of a safetensors file in shared memory: on every device, and without anything set up beforehand."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sapo_rl.errors import UserError
from sapo_rl.rollout.engine import LoadingEngine
from sapo_rl.rollout.weights.base import WeightTransport, make_room

PREFIX = "sapo-weights-"
HEADER_BYTES = 4 << 20
"""Room for the header, which is written last: tensors are taken one by one, and none needs to stay in memory."""
DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
ABANDONED_AFTER = 60.0
"""Seconds before a folder without an owner counts as left behind: its owner may be about to lock it."""


def weights_folder(size: int, shared: Path = Path("/dev/shm")) -> Path:
    """Make a new folder for `FileTransport` in `shared` memory, or where that has no room, among the temporary files.

    Two copies of `size` bytes must fit. Folders that a killed run left there are deleted first.

    Raises:
        UserError: they fit in neither.
    """
    for parent in (shared, Path(tempfile.gettempdir())):
        if parent.is_dir() and os.access(parent, os.W_OK):
            _sweep(parent)
            if shutil.disk_usage(parent).free > 2 * (size + HEADER_BYTES):
                return Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    folders = f"{shared} or {tempfile.gettempdir()}"
    raise UserError(f"no room for {2 * size / 2**30:.1f} GiB of weights in {folders}; free some, or set TMPDIR")


def _sweep(parent: Path) -> None:
    """Delete the folders that no owner locks any more; process ids would not do, containers may share /dev/shm."""
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY)
        except OSError:
            continue  # another user's, or just deleted by its owner
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - folder.stat().st_mtime > ABANDONED_AFTER:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(lock)


def write_safetensors(path: Path, named_tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
    """Write the tensors as `dtype` into the safetensors file `path`, which appears complete or not at all.

    Raises:
        ValueError: more names than the header has room for (about 40,000).
        OSError: the disk is full.
    """
    partial = path.with_suffix(".partial")
    header: dict[str, dict[str, object]] = {}
    end = 0
    with open(partial, "wb", buffering=0) as file:
        file.seek(8 + HEADER_BYTES)
        for name, tensor in named_tensors:
            data = tensor.detach().to(dtype).cpu().contiguous()
            start, end = end, end + data.nbytes
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(data.shape), "data_offsets": [start, end]}
            _write_all(file.fileno(), data.reshape(-1).view(torch.uint8).numpy().data)
        text = json.dumps(header).encode()
        if len(text) > HEADER_BYTES:
            raise ValueError(f"{len(header)} tensors need a header of {len(text)} bytes, more than {HEADER_BYTES}")
        file.seek(0)
        _write_all(file.fileno(), memoryview(HEADER_BYTES.to_bytes(8, "little") + text.ljust(HEADER_BYTES)))
    os.replace(partial, path)


def _write_all(fd: int, data: memoryview) -> None:
    while data:  # the kernel takes at most 2 GiB a call
        data = data[os.write(fd, data) :]


class FileTransport(WeightTransport[LoadingEngine]):
    """Writes one file a version, which the engines read in parallel; the newest stays, for an engine that is restarted.

    Takes possession of `folder`: see `weights_folder`.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder = folder
        self.dtype = dtype
        self._newest: Path | None = None
        self._lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def push(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], engines: Sequence[LoadingEngine], version: int
    ) -> None:
        """See `WeightTransport.push`. Raises what an engine raised."""
        path = self.folder / f"{version}.safetensors"
        write_safetensors(path, named_tensors, self.dtype)
        make_room(engines)
        with ThreadPoolExecutor(len(engines)) as pool:
            list(pool.map(lambda engine: engine.load_weights(path, version), engines))
        if self._newest not in (None, path):
            self._newest.unlink()
        self._newest = path

    def close(self) -> None:
        """Delete the folder."""
        if self._lock >= 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1
