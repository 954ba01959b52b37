"""Runs whose imports are done before they begin: ten seconds less than the command line in a process of its own.

A server imports what a rank does, once for all tests of a worker, and forks a process for each run. It goes the way of
`torchrun --nproc_per_node=1`: the process that reads the arguments is the rank. Tests of how processes start, stop and
end take `command.run`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

from command import ROOT, folders

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["sapo_rl.run.cli", "sapo_rl.run.rank", "sapo_rl.run.packaged", "sapo_rl.policy.lora"])


def run(workspace: Path, *arguments: str, seconds: float = 600, **environment: str) -> tuple[int, str, str]:
    """Run the command line in `workspace`; return the exit code and what was printed on stdout and stderr.

    `environment` is beside the test's own.
    """
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch, name) for name in ("out", "err")]
        process = SERVER.Process(target=_command_line, args=(workspace, arguments, surroundings, files))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
        process.join()
        out, err = (file.read_text(encoding="utf-8") if file.exists() else "" for file in files)
    assert process.exitcode is not None and process.exitcode >= 0, out + err
    return process.exitcode, out, err


def new_run(workspace: Path, *arguments: str) -> Path:
    """Run `tiny.yaml` to a good end and return the one folder that it made."""
    before = folders(workspace)
    code, out, err = run(workspace, "config=tiny.yaml", *arguments)
    assert code == 0, out + err
    (folder,) = folders(workspace) - before
    return folder


def _command_line(workspace: Path, arguments: tuple[str, ...], environment: dict[str, str], files: list[Path]) -> None:
    from sapo_rl.__main__ import main

    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), descriptor)
    os.chdir(workspace)
    os.environ.clear()
    os.environ.update(environment, RANK="0")
    sys.path.insert(0, str(workspace))
    sys.argv = ["sapo-train", *arguments]
    main()
