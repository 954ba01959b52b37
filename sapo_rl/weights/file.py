"""Weights by way of files in shared memory, which trainer and engines map: on every device, or on several."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

from sapo_rl.errors import UserError
from sapo_rl.processes import scratch
from sapo_rl.weights.buffer import BLOCK_BYTES
from sapo_rl.weights.shared import SharedTransport, map_file


def weights_folder(size: int, shared: Path = scratch.SHARED) -> Path:
    """Make a new folder for `FileTransport` in `shared` memory, or where that has no room, among the temporary files.

    `size` bytes must fit, cut into blocks. Folders that a killed run left there are deleted first.

    Raises:
        UserError: they fit in neither.
    """
    needed = size + 2 * BLOCK_BYTES
    for parent in (shared, Path(tempfile.gettempdir())):
        if parent.is_dir() and os.access(parent, os.W_OK):
            scratch.sweep(parent, scratch.WEIGHTS)
            if shutil.disk_usage(parent).free > needed:
                return Path(tempfile.mkdtemp(prefix=scratch.WEIGHTS, dir=parent))
    folders = f"{shared} or {tempfile.gettempdir()}"
    raise UserError(f"no room for {needed / 2**30:.1f} GiB of weights in {folders}; free some, or set TMPDIR")


class FileTransport(SharedTransport):
    """Keeps the weights in files that the engines map; nothing is ever read from or written to them but by memory.

    Takes possession of `folder`: see `weights_folder`.
    """

    kind = "host"

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.folder = folder
        self._files: list[Path] = []
        self._lock = scratch.hold(folder)

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
            scratch.release(self.folder, self._lock)
            self._lock = -1
