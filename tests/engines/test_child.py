"""What vLLM is started with, and what becomes of it when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import engine_settings
from vllm.v1.engine.exceptions import EngineDeadError

from sapo_rl.engines.base import EngineSettings
from sapo_rl.engines.vllm.child import VllmProcess, capture_sizes, llm_arguments


def settings(device: str) -> EngineSettings:
    return engine_settings(
        Path("m"), Path("log"), device=device, max_num_seqs=1000, cpu_kv_cache_gb=0.5, enforce_eager=False
    )


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 9, 255, 256, 257, 512, 1000, 1024])
def test_every_batch_has_a_graph_that_is_not_much_larger(most: int) -> None:
    sizes = capture_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for batch in range(1, most + 1):
        padded = min(size for size in sizes if size >= batch)
        assert padded - batch < 16


def test_cpu_memory_is_in_bytes_and_graphs_are_off() -> None:
    arguments = llm_arguments(settings("cpu"))
    assert arguments["kv_cache_memory_bytes"] == 512 * 2**20
    assert arguments["enforce_eager"] is True
    assert "gpu_memory_utilization" not in arguments


def test_gpu_takes_its_share_and_captures_graphs() -> None:
    arguments = llm_arguments(settings("cuda:1"))
    assert arguments["gpu_memory_utilization"] == 0.3
    assert arguments["enforce_eager"] is False
    assert arguments["compilation_config"]["cudagraph_capture_sizes"][-1] == 1000
    assert "kv_cache_memory_bytes" not in arguments


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_log_probabilities_are_those_of_the_sampling_distribution(device: str) -> None:
    arguments = llm_arguments(settings(device))
    assert arguments["logprobs_mode"] == "processed_logprobs"
    assert arguments["generation_config"] == "vllm"
    assert arguments["trust_remote_code"] is False


def test_a_failure_in_the_midst_of_decoding_is_the_end_of_the_engine() -> None:
    class Failing:
        class llm_engine:
            @staticmethod
            def step() -> list[object]:
                raise RuntimeError("an illegal memory access")

    server = VllmProcess.__new__(VllmProcess)
    server.llm = Failing  # type: ignore[assignment]
    with pytest.raises(EngineDeadError) as raised:
        server.step()
    assert "illegal memory access" in str(raised.value.__cause__)
