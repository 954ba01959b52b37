"""Weights by way of files in shared memory, which trainer and engines map: on every device, or on several."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch

from sapo_rl.errors import UserError
from sapo_rl.rollout.weights.blocks import BLOCK_BYTES
from sapo_rl.rollout.weights.shared import SharedTransport, map_file

PREFIX = "sapo-weights-"
ABANDONED_AFTER = 60.0
"""Seconds before a folder without an owner counts as left behind: its owner may be about to lock it."""


def weights_folder(size: int, shared: Path = Path("/dev/shm")) -> Path:
    """Make a new folder for `FileTransport` in `shared` memory, or where that has no room, among the temporary files.

    `size` bytes must fit, cut into blocks. Folders that a killed run left there are deleted first.

    Raises:
        UserError: they fit in neither.
    """
    needed = size + 2 * BLOCK_BYTES
    for parent in (shared, Path(tempfile.gettempdir())):
        if parent.is_dir() and os.access(parent, os.W_OK):
            _sweep(parent)
            if shutil.disk_usage(parent).free > needed:
                return Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    folders = f"{shared} or {tempfile.gettempdir()}"
    raise UserError(f"no room for {needed / 2**30:.1f} GiB of weights in {folders}; free some, or set TMPDIR")


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


class FileTransport(SharedTransport):
    """Keeps the weights in files that the engines map; nothing is ever read from or written to them but by memory.

    Takes possession of `folder`: see `weights_folder`.
    """

    kind = "host"

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.folder = folder
        self._files: list[Path] = []
        self._lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def allocate(self, size: int) -> torch.Tensor:
        """See `SharedTransport.allocate`. Raises UserError where there is no room any more."""
        path = self.folder / str(len(self._files))
        self._files.append(path)
        with path.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)  # to write to a mapped page without room kills a process
            except OSError as error:
                raise UserError(
                    f"no room for another {size / 2**20:.0f} MiB of weights in {self.folder}: {error}"
                ) from error
        return map_file(path, size)

    def handles(self) -> list[str]:
        """See `SharedTransport.handles`."""
        return [str(path) for path in self._files]

    def close(self) -> None:
        """Delete the folder."""
        super().close()
        if self._lock >= 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1
