"""The engine's environment and what is refused before vLLM starts."""

from __future__ import annotations

import atexit
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import engine_settings

from sapo_rl.engines import process
from sapo_rl.engines.base import Request, Sampling
from sapo_rl.engines.environment import child_environment
from sapo_rl.engines.process import LocalEngine
from sapo_rl.engines.rpc import RpcConnection
from sapo_rl.errors import EngineError, UserError


def test_launcher_and_secrets_do_not_reach_the_child() -> None:
    launcher = {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "a", "ACCELERATE_USE_FSDP": "1", "WANDB_API_KEY": "k",
    }  # fmt: skip
    env = child_environment("cpu", {**launcher, "HF_HOME": "/models", "PATH": "/bin"}, cpus=4)
    assert not set(launcher) & set(env)
    assert env["HF_HOME"] == "/models"
    assert env["PATH"] == "/bin"
    assert env["VLLM_NO_USAGE_STATS"] == env["DO_NOT_TRACK"] == env["HF_HUB_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [(None, "cuda:1", "1"), ("2,5", "cuda:1", "5"), ("GPU-a, GPU-b", "cuda:1", "GPU-b"), ("2,5", "cpu", "")],
)
def test_device_is_counted_among_the_visible_ones(visible: str | None, device: str, expected: str) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert child_environment(device, environ, cpus=2)["CUDA_VISIBLE_DEVICES"] == expected


@pytest.mark.parametrize(
    ("environ", "threads"),
    [
        ({}, "8"),
        ({"OMP_NUM_THREADS": "3"}, "3"),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, "4"),
        ({"LOCAL_WORLD_SIZE": "16"}, "1"),
    ],
)
def test_ranks_share_the_cores(environ: dict[str, str], threads: str) -> None:
    assert child_environment("cpu", environ, cpus=8)["OMP_NUM_THREADS"] == threads


def test_missing_vllm_names_the_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"sapo-train\[gpu\].*sapo-train\[cpu\]"):
        LocalEngine(engine_settings(tmp_path, tmp_path / "engine.log")).start()


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("somebody's own")
    with pytest.raises(UserError, match=f"what vLLM prints cannot be written to '{tmp_path}/logs/vllm.log': .*exists"):
        LocalEngine(engine_settings(tmp_path, tmp_path / "logs" / "vllm.log")).start()
    (tmp_path / "vllm.log").mkdir()
    with pytest.raises(UserError, match=r"vllm\.log': .*Is a directory"):
        LocalEngine(engine_settings(tmp_path, tmp_path / "vllm.log")).start()


def test_an_engine_that_is_not_running_says_so_and_closes(tmp_path: Path) -> None:
    engine = LocalEngine(engine_settings(tmp_path, tmp_path / "engine.log"))
    with pytest.raises(EngineError, match="not running"):
        engine.generate([Request([1], 1)], Sampling(1.0, 1.0, 0, 0.0, 1.0, 4, False))
    engine.close()
    engine.close()


def test_a_start_that_takes_too_long_names_the_setting(tmp_path: Path) -> None:
    engine = LocalEngine(engine_settings(tmp_path, tmp_path / "engine.log", start_timeout=0.01))
    engine.start()
    with pytest.raises(UserError, match=r"^rollout\.start_timeout: vLLM was not ready within 0\.01 s; raise it, .*log"):
        engine.wait_ready()
    engine.close()


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (
            "Traceback ...\nRuntimeError: CUDA Error: out of memory at cumem_allocator.cpp:145\n",
            UserError,
            r"beside the trainer; lower rollout\.gpu_memory_utilization, rollout\.sync_buffer_gb .*\n"
            r"It said, during load_weights: RuntimeError: CUDA Error: out of memory at cumem_allocator",
        ),
        (
            "Traceback ...\nKeyError: 'lm_head.weight'\n",
            EngineError,
            r"(?s)refused the call.*KeyError: 'lm_head.weight'",
        ),
    ],
)
def test_a_refused_call_for_want_of_memory_names_what_helps(
    said: str, error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = Pipe()
    child = SimpleNamespace(rpc=RpcConnection(ours, timeout=60))
    monkeypatch.setattr(process, "ChildProcess", lambda settings: child)
    engine = LocalEngine(engine_settings(tmp_path, tmp_path / "engine.log"))
    engine.start()
    atexit.unregister(engine.close)  # there is no process

    def refuse() -> None:
        number, *_ = theirs.recv()
        theirs.send((number, "failed", said))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(refuse)
        with pytest.raises(error, match=words):
            engine.load_weights("{}", 1)
    theirs.close()


@pytest.mark.parametrize(
    ("said", "helps"),
    [
        ("OSError: [Errno 30] Read-only file system", "/dev/shm"),
        ("OSError: [Errno 28] No space left on device: '/dev/shm/x'", "--shm-size"),
        ("RuntimeError: epoll_create: Too many open files", "ulimit -n"),
    ],
)
def test_what_the_machine_lacks_for_vllm_is_told_with_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, helps: str
) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\nsleep 2\necho "{said}"\nexit 1\n')
    stand_in.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(stand_in))
    engine = LocalEngine(engine_settings(tmp_path, tmp_path / "engine.log"))
    engine.start()
    with pytest.raises(UserError) as error:
        engine.wait_ready()
    engine.close()
    told = str(error.value)
    assert said in told and helps in told and "engine.log" in told
