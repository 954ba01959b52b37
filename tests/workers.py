"""Forks workers of environments and reward functions off a process that has imported what takes them seconds.

That is openai, which agents load, and transformers with torch, by which tools are described. `python workers.py FOLDER`
listens at FOLDER/workers, as `nursery.py` does; the fixture `forked_workers` has a test's workers come from there.
"""

from __future__ import annotations

import functools
import importlib
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import nursery

IMPORTED = (
    "torch",
    "transformers.utils.chat_template_utils",
    "sapo_rl.environments.runner.worker",
    "sapo_rl.rewards.runner.worker",
)
GETPPID = os.getppid


def main() -> None:
    forked.FOLDER = folder = Path(sys.argv[1])
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(folder / "workers"))
    listener.listen(64)
    sys.path.pop(0)  # the folder of tests
    warnings.filterwarnings("ignore", ".*found in sys.modules after import of package")
    for name in IMPORTED:
        importlib.import_module(name)
    _use_openai()
    os.register_at_fork(after_in_child=functools.partial(setattr, os, "getppid", GETPPID))  # of a guardian's child
    (folder / "ready").touch()
    nursery._serve(listener)


def _use_openai() -> None:
    """Have it import what it does when it is first used."""
    import openai

    for client in (openai.OpenAI, openai.AsyncOpenAI):
        assert client(base_url="http://127.0.0.1:1", api_key="none").chat.completions


@functools.cache
def _server() -> Path:
    return forked.serving("workers.py") / "workers"


def popen(command: list[str], **how: Any) -> forked.Popen:
    """Do as `subprocess.Popen` of a worker."""
    return forked.Popen(command, server=_server(), **how)


SUBPROCESS = SimpleNamespace(**{**vars(subprocess), "Popen": popen})
"""What `sapo_rl.processes.guarded` starts workers by."""

if __name__ == "__main__":
    main()
