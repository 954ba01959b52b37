"""The files of a checkpoint, and the manifest that tells whether they are as they were written. Imports no torch.

`manifest.json`, written last, holds the step, and the size and checksum of every other file. What is damaged, missing,
left over or of another step is refused by its name, before anything is started.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from sapo_rl.errors import UserError
from sapo_rl.run_folder import checkpoints_in, step_of

MANIFEST = "manifest.json"
RECORD = "state.json"
"""How far the run had come, and what the loop wants back."""
OWN = re.compile(r"state\.json|random_\d+\.json|(trainer|loop)_\d+\.safetensors")
"""Names of the other files; whatever else lies beside them is somebody's own."""
CHUNK = 8 << 20
"""Bytes that are hashed at a time."""


class Entry(NamedTuple):
    """What the manifest holds of a file."""

    size: int
    """In bytes."""
    start: int
    """The checksum is of the bytes from here on, then of those before: a file's header may be written last."""
    checksum: str
    """XXH3, 128 bits, hexadecimal."""


def entry_of(path: Path, start: int = 0) -> Entry:
    """Read a file and return its entry."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        size = file.seek(0, 2)
        for begin, end in ((start, size), (0, min(start, size))):
            file.seek(begin)
            for at in range(begin, end, CHUNK):
                digest.update(file.read(min(CHUNK, end - at)))
    return Entry(size, start, digest.hexdigest())


def write_manifest(checkpoint: Path, step: int, entries: Mapping[str, Entry]) -> None:
    """Write the manifest of a checkpoint of `step` steps whose other files, by name, are `entries`."""
    files = {name: entries[name]._asdict() for name in sorted(entries)}
    content = {"step": step, "files": files, "checksum": _checksum(step, files)}
    (checkpoint / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_manifest(checkpoint: Path) -> dict[str, Entry]:
    """Return the entries by file name; of the files themselves, only which there are is compared with it.

    Raises:
        UserError: the manifest is missing, damaged or of another step, or a file is missing or left over.
    """
    path = checkpoint / MANIFEST
    with reading(path):
        if not path.is_file():
            raise ValueError("there is none: the checkpoint is of an older version, or was not copied whole")
        content = json.loads(path.read_bytes())
        step, files = content["step"], content["files"]
        if content["checksum"] != _checksum(step, files):
            raise ValueError("it is damaged, its checksum differs")
        if step != step_of(checkpoint):
            raise ValueError(f"it is of step {step}, not of the one in the folder's name")
        entries = {name: Entry(**fields) for name, fields in files.items()}
        present = {file.name for file in checkpoint.iterdir() if OWN.fullmatch(file.name)}
    for name in sorted(present ^ entries.keys()):
        with reading(checkpoint / name):
            raise ValueError("it is missing" if name in entries else "it is none of the files that were written")
    return entries


def verify(checkpoint: Path, name: str, entry: Entry) -> None:
    """Raise UserError where a file is not as it was written."""
    path = checkpoint / name
    with reading(path):
        size = path.stat().st_size
        if size != entry.size:
            raise ValueError(f"it has {size} bytes, and {entry.size} were written")
        if entry_of(path, entry.start) != entry:
            raise ValueError("it is damaged, its checksum differs")


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Return what `state.json` holds, verified.

    Raises:
        UserError: the manifest or the file is damaged.
    """
    verify(checkpoint, RECORD, read_manifest(checkpoint)[RECORD])
    with reading(checkpoint / RECORD):
        record = json.loads((checkpoint / RECORD).read_bytes())
        kept = {name: record[name] for name in ("step", "updates", "state")}
        return kept | {"tau_scale": float(record.get("tau_scale", 1.0))}  # of a run whose temperatures stood still


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a checkpoint's file into a UserError: which file, and what is left to resume from."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        checkpoint = path.parent
        older = [other.name for other in checkpoints_in(checkpoint.parent) if other != checkpoint][-1:]
        way = f"move '{checkpoint}' away to resume from {older[0]}" if older else "it is the only one: start anew"
        own = isinstance(error, OSError) or type(error) is ValueError
        problem = str(error) if own else f"it is damaged: {error!r}"
        raise UserError(f"resume: '{path}' cannot be used: {problem}; {way}") from error


def _checksum(step: Any, files: Any) -> str:
    return xxhash.xxh3_128(json.dumps([step, files], sort_keys=True).encode()).hexdigest()
