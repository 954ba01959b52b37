"""Weights by way of a safetensors file in shared memory: on every device, and without anything set up beforehand."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sapo_rl.errors import UserError
from sapo_rl.rollout.engine import LoadingEngine
from sapo_rl.rollout.weights.base import WeightTransport, make_room
from sapo_rl.tensor_file import HEADER_BYTES, write_tensors

PREFIX = "sapo-weights-"
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
        if not engines:  # another rank's engine has this device; but all ranks gather the weights together
            deque(named_tensors, maxlen=0)
            return
        path = self.folder / f"{version}.safetensors"
        write_tensors(path, named_tensors, self.dtype)
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
