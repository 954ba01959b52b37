"""Whole runs on one GPU, and what is left of them, however they end."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from command import finish, folders, new_run, run, start, timeless, wait_for_step
from tiny import make_workspace

pytestmark = pytest.mark.gpu

SLACK = 200
"""MiB of a GPU's memory that others may take or give back meanwhile; an engine that is left behind keeps more."""
RAISES = """
def raises(completions, **columns):
    raise ValueError("no")
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_workspace(
        tmp_path_factory.mktemp("workspace"),
        tiny_model,
        RAISES,
        model={"dtype": "bfloat16"},
        rollout={"enforce_eager": True, "gpu_memory_utilization": 0.1, "engines_per_gpu": "1"},
        trainer={"steps": 3, "compile": False},
        eval={"prompts": 0},
        checkpoint={"every": 0, "save_final": False},
        logging={"wandb": "off"},
    )


def used_memory() -> int:
    """MiB in use on the GPU, by whatever process: PyTorch's own count would need a context, which takes some itself."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


def assert_given_back(before: int) -> None:
    for _ in range(50):  # the driver takes a moment
        if used_memory() < before + SLACK:
            return
        time.sleep(0.1)
    raise AssertionError(f"{used_memory()} MiB in use, {before} before")


def test_overlap_without_staleness_is_sync(workspace: Path) -> None:
    before = used_memory()
    sync = new_run(workspace, "rollout.mode=sync")
    overlap = new_run(workspace, "rollout.mode=overlap", "rollout.max_staleness=0")
    assert timeless(overlap) == timeless(sync)
    assert_given_back(before)


def test_a_reward_that_raises_leaves_nothing_on_the_gpu(workspace: Path) -> None:
    before = used_memory()
    code, out, err = run(workspace, "config=tiny.yaml", "+reward.functions.bad.function=my_rewards.raises")
    assert code == 2 and "my_rewards.raises" in err, out + err
    assert_given_back(before)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_no_process_and_no_memory(workspace: Path, sent: signal.Signals) -> None:
    memory, before = used_memory(), folders(workspace)
    process = start(workspace, "config=tiny.yaml", "trainer.steps=5000")
    wait_for_step(process, workspace, before, 2)
    family = psutil.Process(process.pid).children(recursive=True)
    assert used_memory() > memory + SLACK and len(family) >= 3  # a rank, its vLLM, its rewards
    (rank,) = (member for member in family if "sapo_rl.run.rank" in member.cmdline())
    rank.send_signal(sent)
    code, out, err = finish(process)
    assert code == (137 if sent == signal.SIGKILL else 130), out + err
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [member for member in alive if member.status() != psutil.STATUS_ZOMBIE]
    assert_given_back(memory)
