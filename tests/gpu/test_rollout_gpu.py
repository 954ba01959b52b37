"""vLLM on a GPU: weights by way of shared memory, sleep, restarts, and what is left afterwards."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from tiny import engine_settings, generate
from transformers import AutoModelForCausalLM, PreTrainedModel

from sapo_rl.engines.base import Completion, Request, Sampling
from sapo_rl.engines.build import close_all
from sapo_rl.engines.parity import verify
from sapo_rl.engines.process import LocalEngine
from sapo_rl.weights.buckets import BucketTransport
from sapo_rl.weights.file import FileTransport, weights_folder
from sapo_rl.weights.ipc import IpcTransport
from sapo_rl.weights.memory import SharedMemory

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
PARITY = 0.05
SLACK = 400 * MIB
"""What the tests' own process keeps: kernels, workspaces. An engine that is left behind keeps more."""
GREEDY = Sampling(0.0, 1.0, 0, 0.0, 1.0, 24, False)
PROMPT = [4 + i % 200 for i in range(200)]  # longer than a block of the key-value cache, so that it is cached
Fleet = tuple[list[LocalEngine], IpcTransport]


def free_memory() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def family(engine: LocalEngine) -> list[psutil.Process]:
    """The engine's process and all that it started."""
    log = str(engine.settings.log_path)
    child = next(p for p in psutil.Process().children() if any(file.path == log for file in p.open_files()))
    return [child, *child.children(recursive=True)]


@pytest.fixture(scope="module")
def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two engines on one GPU that sleep at level 2, the first with a core process; when closed, nothing is left."""
    torch.zeros(1, device="cuda")
    before, logs = free_memory(), tmp_path_factory.mktemp("logs")
    transport = IpcTransport(torch.bfloat16)
    gpu = {"device": "cuda:0", "dtype": "bfloat16", "kv_cache_bytes": 256 * MIB, "sleep_level": 2}
    engines = [
        LocalEngine(engine_settings(tiny_model, logs / f"{i}.log", seed=i, core_process=i == 0, **gpu))
        for i in range(2)
    ]
    for engine in engines:
        engine.start()
    for engine in engines:
        engine.wait_ready()
    yield engines, transport
    processes = [process for engine in engines for process in family(engine)]
    assert len(processes) >= 3  # a child each, and a core
    close_all(engines)
    transport.close()
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]  # left for init to reap
    for _ in range(50):  # the driver takes a moment
        if free_memory() > before - SLACK:
            break
        time.sleep(0.1)
    assert free_memory() > before - SLACK


def changed(tiny_model: Path, seed: int) -> PreTrainedModel:
    """The trainer's model after training: float32, other weights in every tensor."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).cuda()
    generator = torch.Generator("cuda").manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator, device="cuda"))
    return model


@torch.no_grad()
def logps_of(model: PreTrainedModel, token_ids: list[int]) -> list[float]:
    ids = torch.tensor([token_ids], device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = model(ids).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()


def mismatch(engine: LocalEngine, model: PreTrainedModel) -> float:
    return verify(engine, PROMPT, logps_of(model, PROMPT), "bfloat16")


def greedy(engine: LocalEngine) -> list[list[Completion]]:
    return generate(engine, [Request(PROMPT, 1)], GREEDY)


def test_memory_is_shared_with_another_process() -> None:
    memory = SharedMemory.allocate(4 * MIB)
    memory.tensor().copy_(torch.arange(4 * MIB, device="cuda") % 251)
    torch.cuda.synchronize()
    code = (
        "import sys, torch; from sapo_rl.weights.memory import SharedMemory;"
        "found = SharedMemory.open(bytes.fromhex(sys.argv[1]), int(sys.argv[2])).tensor();"
        "print(found.long().sum().item(), found[-1].item(), found.device)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, memory.export().hex(), str(memory.size)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    expected = (torch.arange(4 * MIB) % 251).sum().item()
    assert told.stdout.split() == [str(expected), str((4 * MIB - 1) % 251), "cuda:0"], told.stderr
    memory.free()


def test_shared_memory_goes_back() -> None:
    before = free_memory()
    memory = SharedMemory.allocate(4 * SLACK)
    memory.tensor().zero_()
    assert free_memory() < before - 3 * SLACK
    memory.free()
    assert free_memory() > before - SLACK


def test_what_does_not_fit_says_so() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="weights on their way to vLLM"):
        SharedMemory.allocate(1 << 50)


def test_pushed_weights_are_the_ones_that_generate(fleet: Fleet, tiny_model: Path) -> None:
    engines, transport = fleet
    first, second = changed(tiny_model, 1), changed(tiny_model, 2)
    answers = []
    for version, model in enumerate((first, second, first), start=1):
        transport.push(model.named_parameters(), engines, version)
        assert [engine.weight_version for engine in engines] == [version, version]
        answers.append([greedy(engine) for engine in engines])
        assert answers[-1][0] == answers[-1][1]
        assert max(mismatch(engine, model) for engine in engines) < PARITY
    assert answers[0] != answers[1]
    assert answers[0] == answers[2]


def test_file_and_shared_memory_bring_the_same_weights(fleet: Fleet, tiny_model: Path) -> None:
    engines, transport = fleet
    model, file = changed(tiny_model, 3), FileTransport(weights_folder(1 << 20), torch.bfloat16)
    transport.push(model.named_parameters(), engines[:1], 4)
    file.push(model.named_parameters(), engines[1:], 4)
    assert engines[0].score(PROMPT) == engines[1].score(PROMPT)
    transport.push(model.named_parameters(), engines, 4)
    file.close()


def test_weights_through_a_small_buffer_are_those_of_a_whole_copy(fleet: Fleet, tiny_model: Path) -> None:
    engines, whole = fleet
    files = FileTransport(weights_folder(1 << 20), torch.bfloat16)
    buckets = BucketTransport(IpcTransport(torch.bfloat16), files, half=64 << 10, keep=True)
    for seed in (8, 9):
        model = changed(tiny_model, seed)
        whole.push(model.named_parameters(), engines[:1], seed)
        buckets.push(model.named_parameters(), engines[1:], seed)
        assert engines[0].score(PROMPT) == engines[1].score(PROMPT)
    engines[1].sleep()
    assert engines[0].score(PROMPT) == engines[1].score(PROMPT)  # woken up from the copy in the host's memory
    for engine in engines:
        engine.sleep()
    model = changed(tiny_model, 10)
    buckets.push(model.named_parameters(), engines, 10)
    assert not any(engine.asleep for engine in engines)
    assert max(mismatch(engine, model) for engine in engines) < PARITY
    whole.push(model.named_parameters(), engines, 10)
    buckets.close()


def test_sleep_frees_memory_and_the_next_push_wakes_up(fleet: Fleet, tiny_model: Path) -> None:
    engines, transport = fleet
    model = changed(tiny_model, 5)
    transport.push(changed(tiny_model, 4).named_parameters(), engines, 5)
    before = free_memory()
    for engine in engines:
        engine.sleep()
    assert all(engine.asleep for engine in engines)
    assert free_memory() - before > 2 * 250 * MIB
    transport.push(model.named_parameters(), engines, 6)
    assert not any(engine.asleep for engine in engines)
    answers = [greedy(engine) for engine in engines]
    assert max(mismatch(engine, model) for engine in engines) < PARITY
    for engine in engines:
        engine.sleep()
    assert [greedy(engine) for engine in engines] == answers  # wakes up by itself, with the same weights


def test_a_killed_engine_comes_back_with_the_pushed_weights(fleet: Fleet, tiny_model: Path) -> None:
    engines, transport = fleet
    pushed = changed(tiny_model, 6)
    transport.push(pushed.named_parameters(), engines, 7)
    expected = greedy(engines[0])
    with torch.no_grad():
        for weight in pushed.parameters():  # the trainer is at work: what comes back must be what was pushed
            weight.mul_(2)
    core = max(family(engines[0])[1:], key=lambda process: process.memory_info().rss)
    core.kill()
    core.wait(10)
    assert greedy(engines[0]) == expected
    assert (engines[0].restarts, engines[1].restarts) == (1, 0)
    assert greedy(engines[1]) == expected


def test_a_sleeping_engine_that_is_killed_comes_back(fleet: Fleet, tiny_model: Path) -> None:
    engines, transport = fleet
    model = changed(tiny_model, 7)
    engines[1].sleep()
    for process in family(engines[1]):
        process.kill()
    transport.push(model.named_parameters(), engines, 8)
    assert max(mismatch(engine, model) for engine in engines) < PARITY
    assert engines[1].restarts == 1
