"""What all tests share: a quiet and offline environment, the order of the suite, and a tiny model."""

from __future__ import annotations

import functools
import gc
import os
import signal
import subprocess
from pathlib import Path

import pytest

# Set on import, before any test module loads a library that reads them; child processes inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)
os.environ.pop("WANDB_API_KEY", None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: programs under test must hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # the same of `nohup`
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


LONGEST = ("run", "servers", "kill", "engine", "ranks", "lora", "episodes", "examples", "evaluation", "judge")
"""Modules of e2e and multi that take minutes: begun first, so that no worker is left alone with one at the end."""


@functools.cache
def cuda_device() -> bool:
    """True where the driver lists a GPU; asks nvidia-smi, which is quicker than importing torch."""
    try:
        return "GPU 0" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the quick tests first, then those that take longest, and skip those marked `gpu` where there is none."""

    def place(item: pytest.Item) -> tuple[bool, int]:
        slow = any(item.get_closest_marker(name) for name in ("e2e", "multi", "gpu"))
        name = item.path.stem.removeprefix("test_")
        return slow, LONGEST.index(name) if slow and name in LONGEST else len(LONGEST)

    items.sort(key=place)
    for item in items:
        if item.get_closest_marker("gpu") and not cuda_device():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Leave what the modules of tests have imported out of every later search for garbage, half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random model with tokenizer and chat template, made once a session. Do not write into it."""
    from tiny import make_tiny_model

    folder = tmp_path_factory.mktemp("tiny-model")
    make_tiny_model(folder)
    return folder


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have workers forked: those of tests that are not about how they start."""
    import workers

    monkeypatch.setattr("sapo_rl.processes.guarded.subprocess", workers.SUBPROCESS)
