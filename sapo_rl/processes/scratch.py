"""Folders for temporary files, locked by their owner: what a killed run left in them is deleted by whoever comes next.

Locks tell whether an owner is alive; process ids would not do, for containers may share these folders.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

SHARED = Path("/dev/shm")
WEIGHTS = "sapo-weights-"
"""Begins the name of a folder of weights, in shared memory or among the temporary files."""
FILES = "sapo-run-"
"""Begins the name of a folder for what the processes of a run put among the temporary files."""
LONGEST = 64
"""Characters of a path that leave room for the names of sockets."""


def sweep(parent: Path, prefix: str) -> None:
    """Delete this user's folders in `parent` whose names begin with `prefix` and that no owner holds any more."""
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # another user's, no folder at all, or just deleted by its owner
            lock = _open(folder)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _owns(lock, folder):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def sweep_all() -> None:
    """Delete what runs that were killed have left on this machine."""
    temporary = Path(tempfile.gettempdir())
    if temporary.name.startswith(FILES):  # this process's own is the one of its run
        temporary = temporary.parent
    for parent, prefix in ((SHARED, WEIGHTS), (temporary, WEIGHTS), (temporary, FILES)):
        sweep(parent, prefix)


def hold(folder: Path) -> int:
    """Make `folder` unless it is there, and become its owner until the descriptor returned is closed.

    Raises:
        OSError: the folder cannot be made, is a link or is another user's.
    """
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        lock = _open(folder)
        with contextlib.suppress(OSError):  # a file system without locks: nobody can sweep it either
            fcntl.flock(lock, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if _owns(lock, folder):
                return lock
        os.close(lock)  # it was swept in the moment before the lock
        if folder.exists():
            raise PermissionError(f"{folder} belongs to another user")


def release(folder: Path, lock: int) -> None:
    """Delete a folder and give its lock back."""
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder among the temporary files that is deleted at the end of the block, or once its owner is dead."""
    folder = Path(tempfile.mkdtemp(prefix=FILES))
    lock = hold(folder)
    try:
        yield folder
    finally:
        release(folder, lock)


def variables(folder: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what sends the temporary files of a child to `folder`, but for what it compiles once for all runs."""
    if len(str(folder)) > LONGEST:
        return {}
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{os.geteuid()}"
    return {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": environ.get("TORCHINDUCTOR_CACHE_DIR", str(compiled))}


def _open(folder: Path) -> int:
    """Open a folder, not what stands under its name: a link, or a pipe that would wait for a writer."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK)


def _owns(lock: int, folder: Path) -> bool:
    """Whether an open folder is this user's and still the one of that name."""
    held, found = os.fstat(lock), os.stat(folder, follow_symlinks=False)
    return held.st_uid == os.geteuid() and (held.st_dev, held.st_ino) == (found.st_dev, found.st_ino)
