"""The engine's environment and what is refused before vLLM starts."""

from __future__ import annotations

import atexit
import importlib.util
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import engine_settings
from waiting import until

from sapo_rl.engines import process
from sapo_rl.engines.base import EngineSettings, Request, Sampling
from sapo_rl.engines.environment import child_environment, server_environment
from sapo_rl.engines.process import LocalEngine
from sapo_rl.engines.rpc import RpcConnection
from sapo_rl.errors import EngineError, EngineLost, UserError


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


def test_a_server_on_the_cpu_computes_in_one_process_on_all_cores_unless_the_user_says_otherwise() -> None:
    names = ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS")

    def found(on_gpu: bool = False, workers: int = 1, **environ: str) -> list[str | None]:
        made = server_environment(environ, on_gpu, cpus=8, workers=workers)
        return [made.get(name) for name in names]

    assert found() == ["0", "8"]
    assert found(OMP_NUM_THREADS="2") == ["0", "2"]
    assert found(workers=2) == found(on_gpu=True) == [None, None]


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
    for call in (engine.wait_ready, engine.recover, lambda: engine.score([1, 2])):
        with pytest.raises(EngineError, match="not running"):
            call()
    (answer,) = engine.submit([Request([1], 1)], Sampling(1.0, 1.0, 0, 0.0, 1.0, 4, False))
    with pytest.raises(EngineLost, match="not running"):
        answer.result(10)
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

    theirs.send([(0, "done", None)])
    engine.wait_ready()

    def refuse() -> None:
        ((number, *_),) = theirs.recv()
        theirs.send([(number, "failed", said)])

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


class Stand:
    """A child process without a process: `theirs` is its end of the connection."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.lock = threading.Lock()
        ours, self.theirs = Pipe()
        self.rpc = RpcConnection(ours, settings.timeout)
        self.theirs.send([(0, "done", None)])

    def expect(self, method: str) -> tuple[int, tuple[Any, ...]]:
        """Return the number and the arguments of the next call, which is alone in its message."""
        ((number, found, arguments),) = self.theirs.recv()
        assert found == method
        return number, arguments

    def answer(self, number: int, result: Any = None) -> None:
        self.theirs.send([(number, "done", result)])

    def kill(self) -> None:
        with self.lock:  # the engine kills what is lost
            self.theirs.close()

    def ask_to_end(self, seconds: float) -> None:
        pass

    def end_of_log(self) -> str:
        return "the end of the log"


@pytest.fixture
def stands(monkeypatch: pytest.MonkeyPatch) -> list[Stand]:
    made: list[Stand] = []

    def make(settings: EngineSettings) -> Stand:
        made.append(Stand(settings))
        return made[-1]

    monkeypatch.setattr(process, "ChildProcess", make)
    return made


GREEDY = Sampling(0.0, 1.0, 0, 0.0, 1.0, 4, False)


@pytest.fixture
def engine(stands: list[Stand], tmp_path: Path) -> Iterator[LocalEngine]:
    made = LocalEngine(engine_settings(tmp_path, tmp_path / "engine.log", seed=5))
    made.start()
    made.wait_ready()
    yield made
    made.close()


def test_a_lost_child_fails_what_is_open_and_the_next_one_has_another_seed_and_the_weights(
    engine: LocalEngine, stands: list[Stand]
) -> None:
    with ThreadPoolExecutor(2) as pool:
        loading = pool.submit(engine.load_weights, "layout", 3)
        stands[0].answer(stands[0].expect("load_weights")[0])
        loading.result(10)
        answers = engine.submit([Request([1], 1), Request([2], 1)], GREEDY)
        stands[0].kill()
        for answer in answers:
            with pytest.raises(EngineLost, match="its process died"):
                answer.result(10)
        with pytest.raises(EngineLost):
            engine.submit([Request([1], 1)], GREEDY)[0].result(10)  # never waits for another child
        recoveries = [pool.submit(engine.recover) for _ in range(2)]
        until(lambda: len(stands) == 2)
        number, arguments = stands[1].expect("load_weights")
        assert arguments == ("layout",)
        early = engine.submit([Request([1], 1)], GREEDY)[0]
        with pytest.raises(EngineLost):
            early.result(10)  # nothing is written before the weights are there
        stands[1].answer(number)
        for recovery in recoveries:
            recovery.result(10)
        assert [stand.settings.seed for stand in stands] == [5, 6]
        assert (engine.restarts, engine.weight_version) == (1, 3)
        (answer,) = engine.submit([Request([1], 1)], GREEDY)
        stands[1].answer(stands[1].expect("add")[0], ["completion"])
        assert answer.result(10) == ["completion"]


def test_a_call_that_waits_is_repeated_in_the_next_child(engine: LocalEngine, stands: list[Stand]) -> None:
    with ThreadPoolExecutor(1) as pool:
        scored = pool.submit(engine.score, [1, 2])
        stands[0].expect("score")
        stands[0].kill()
        until(lambda: len(stands) == 2)
        stands[1].answer(stands[1].expect("score")[0], [-1.0])
        assert scored.result(10) == [-1.0]


def test_more_losses_than_allowed_are_told_to_all_that_call_from_then_on(
    engine: LocalEngine, stands: list[Stand]
) -> None:
    for _ in range(2):
        stands[-1].kill()
        until(lambda: bool(stands[-1].rpc.lost))
        engine.recover()
    stands[-1].kill()
    until(lambda: bool(stands[-1].rpc.lost))
    words = r"vLLM failed after 2 restarts \(rollout.max_restarts=2\): its process died; the end of the log"
    for call in (engine.recover, lambda: engine.score([1, 2]), lambda: engine.load_weights("x", 1)):
        with pytest.raises(EngineError, match=words):
            call()
    assert not engine.stream_weights("x", None, 1)
    assert len(stands) == 3


def test_weights_count_before_anything_that_they_have_written(engine: LocalEngine, stands: list[Stand]) -> None:
    versions: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        (answer,) = engine.submit([Request([1], 1)], GREEDY)
        answer.add_done_callback(lambda _: versions.append(engine.weight_version))
        number, _ = stands[0].expect("add")
        loading = pool.submit(engine.load_weights, "layout", 4)
        load, _ = stands[0].expect("load_weights")
        assert engine.weight_version == 0
        stands[0].theirs.send([(load, "done", None), (number, "done", [])])
        loading.result(10)
        assert (versions, engine.weight_version) == ([4], 4)


def test_a_stream_of_weights_that_a_child_did_not_outlive_is_not_loaded(
    engine: LocalEngine, stands: list[Stand]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(engine.stream_weights, "buffer", "copy", 2)
        assert stands[0].expect("stream_weights")[1] == ("buffer", "copy")
        stands[0].kill()
        assert streaming.result(10) is False
        assert len(stands) == 1  # it would wait for the end of the stream
        recovery = pool.submit(engine.recover)
        until(lambda: len(stands) == 2)
        number, arguments = stands[1].expect("load_weights")
        assert arguments == ("copy",)
        stands[1].answer(number)
        recovery.result(10)
    assert engine.weight_version == 0
