"""Forks workers of environments and reward functions off a process that has imported what takes them seconds.

That is openai, which agents load, transformers, by which tools are described, and torch, for reward models. `python
workers.py FOLDER` listens at FOLDER/workers, as `nursery.py` does; the fixture `forked_workers` has a test's workers
come from there.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
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
    folder = Path(sys.argv[1])
    (listener,) = nursery.begin(folder, ["workers"], IMPORTED)
    _use_openai()
    os.register_at_fork(after_in_child=functools.partial(setattr, os, "getppid", GETPPID))  # of a guardian's child
    (folder / "ready").touch()
    nursery.serve(listener)


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
