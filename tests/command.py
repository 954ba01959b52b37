"""Runs through the command line in a user's folder (`tiny.make_workspace`), and what they leave there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import forked

ROOT = Path(__file__).parents[1]
MODULE = ("-m", "sapo_rl")
Process: TypeAlias = "subprocess.Popen[str] | forked.Popen"
CLOCKS = ("time/", "perf/tokens_per_second", "rollout/prefix_hit")


def start(
    workspace: Path, *arguments: str, prefix: tuple[str, ...] = (), module: tuple[str, ...] = MODULE
) -> subprocess.Popen[str]:
    """Start the command line; `prefix` goes before Python, and `module` may start it through a launcher."""
    environment = {key: value for key, value in os.environ.items() if key != "GLOO_SOCKET_IFNAME"}
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    return subprocess.Popen(
        [*prefix, sys.executable, *module, *arguments],
        cwd=workspace,
        env={**environment, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: Process, seconds: float = 600) -> tuple[int, str, str]:
    """Wait for the end; return the exit code and what was printed on stdout and stderr."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode is not None
    return process.returncode, out, err


def run(workspace: Path, *arguments: str, **how: tuple[str, ...]) -> tuple[int, str, str]:
    """`start` and `finish`."""
    return finish(start(workspace, *arguments, **how))


def sapo_train(
    *arguments: str, cwd: Path, program: tuple[str, ...] = MODULE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in `cwd`, for what ends by itself; `environment` is beside the test's own."""
    return subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def new_run(workspace: Path, *arguments: str, **how: tuple[str, ...]) -> Path:
    """Run `tiny.yaml` to a good end and return the one folder that it made."""
    before = folders(workspace)
    code, out, err = run(workspace, "config=tiny.yaml", *arguments, **how)
    assert code == 0, out + err
    (folder,) = folders(workspace) - before
    return folder


def folders(workspace: Path) -> set[Path]:
    """The folders of the recipe's runs so far."""
    return {path for path in workspace.glob("runs/tiny/*") if path.is_dir() and not path.is_symlink()}


def records(folder: Path) -> list[dict[str, Any]]:
    """Every line of `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of training steps."""
    return [record for record in records(folder) if "policy/loss" in record]


def timeless(folder: Path) -> list[dict[str, Any]]:
    """Every line without what depends on the clock."""
    return [
        {key: value for key, value in record.items() if key != "time" and not key.startswith(CLOCKS)}
        for record in records(folder)
    ]


def wait_for_step(process: Process, workspace: Path, before: set[Path], step: int, seconds: float = 300) -> Path:
    """Wait until `process` has made `step` steps in a folder that is not in `before`; return the folder."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
        for folder in folders(workspace) - before:
            if (folder / "metrics.jsonl").is_file() and len(steps_of(folder)) >= step:
                return folder
    process.kill()
    raise AssertionError("the step never came:\n" + "".join(process.communicate()))
