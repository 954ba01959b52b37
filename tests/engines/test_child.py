"""What vLLM is started with, and what becomes of it when it fails."""

from __future__ import annotations

import threading
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import engine_settings
from transformers import GPT2Config

from sapo_rl.engines.base import Completion, EngineSettings, Request, Sampling
from sapo_rl.engines.vllm import child
from sapo_rl.engines.vllm.child import VllmProcess, capture_sizes, llm_arguments, register


def settings(device: str) -> EngineSettings:
    return engine_settings(
        Path("m"), Path("log"), device=device, max_num_seqs=1000, cpu_kv_cache_gb=0.5, enforce_eager=False
    )


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 9, 255, 256, 257, 512, 1000, 1024])
def test_every_batch_has_a_graph_that_is_not_much_larger(most: int) -> None:
    sizes = capture_sizes(most)
    assert sizes == sorted(set(sizes))
    assert {most, 2 * most} <= set(sizes)
    assert sizes[-1] == 2 * most
    for tokens in range(1, 2 * most + 1):  # above `most` a step reads prompts beside what it decodes
        padded = min(size for size in sizes if size >= tokens)
        assert padded - tokens < (16 if tokens <= most else 32)


def test_cpu_memory_is_in_bytes_and_graphs_are_off() -> None:
    arguments = llm_arguments(settings("cpu"))
    assert arguments["kv_cache_memory_bytes"] == 512 * 2**20
    assert arguments["enforce_eager"] is True
    assert "gpu_memory_utilization" not in arguments


def test_gpu_takes_its_share_and_captures_graphs() -> None:
    arguments = llm_arguments(settings("cuda:1"))
    assert arguments["gpu_memory_utilization"] == 0.3
    assert arguments["enforce_eager"] is False
    assert arguments["compilation_config"]["cudagraph_capture_sizes"][-1] == 2000
    assert "kv_cache_memory_bytes" not in arguments


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_log_probabilities_are_those_of_the_sampling_distribution(device: str) -> None:
    arguments = llm_arguments(settings(device))
    assert arguments["logprobs_mode"] == "processed_logprobs"
    assert arguments["generation_config"] == "vllm"
    assert arguments["trust_remote_code"] is False


def test_vllm_makes_room_for_adapters_of_the_next_rank_that_it_has() -> None:
    assert "enable_lora" not in llm_arguments(settings("cpu"))
    for rank, room in ((1, 1), (8, 8), (48, 64), (512, 512)):
        found = llm_arguments(replace(settings("cuda:0"), lora_rank=rank, lora_modules=("q_proj",)))
        assert (found["enable_lora"], found["max_lora_rank"], found["lora_target_modules"]) == (True, room, ["q_proj"])


def test_adapters_for_a_model_that_vllm_runs_without_them_only_are_refused_before_it_loads(tmp_path: Path) -> None:
    plain = GPT2Config()
    plain.architectures = ["GPT2LMHeadModel"]
    plain.save_pretrained(tmp_path)
    given = engine_settings(tmp_path, tmp_path / "log")
    register(given)
    with pytest.raises(ValueError, match=r"lora\.sync: vLLM takes no adapters for GPT2LMHeadModel; set merged$"):
        register(replace(given, lora_rank=8))


def test_a_failure_in_the_midst_of_decoding_is_the_end_of_the_engine() -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

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


class Llm:
    """Takes requests down, and finishes all of them at the next step."""

    def __init__(self) -> None:
        self.enqueued: list[tuple[list[int], str]] = []
        self.events: list[str] = []
        self.under_way: list[str] = []
        self.llm_engine = self

    def enqueue(self, prompts: list[dict[str, Any]], params: list[object], **options: object) -> list[str]:
        (prompt,) = prompts
        if len(prompt["prompt_token_ids"]) > 4:
            raise ValueError("too long")
        self.enqueued.append((prompt["prompt_token_ids"], prompt["cache_salt"]))
        self.events.append("enqueue")
        self.under_way.append(str(len(self.enqueued)))
        return [f"{self.under_way[-1]}-abc"]

    def step(self) -> list[Any]:
        done, self.under_way = self.under_way, []
        one = SimpleNamespace(token_ids=[7], finish_reason="stop", logprobs=None)
        about = {"finished": True, "outputs": [one], "num_cached_tokens": 3}
        return [SimpleNamespace(request_id=name, **about) for name in done]

    def abort_request(self, names: list[str]) -> None:
        self.under_way = [name for name in self.under_way if name not in names]

    def collective_rpc(self, method: str, args: tuple[str]) -> None:
        self.events.append(f"{method} {args[0]}")

    def sleep(self, level: int) -> None:
        self.events.append("sleep")

    def wake_up(self, tags: list[str]) -> None:
        self.events.append(f"wake {tags[0]}")


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> tuple[VllmProcess, Llm]:
    made, llm = VllmProcess.__new__(VllmProcess), Llm()
    monkeypatch.setattr("vllm.LLM", lambda **arguments: llm)
    monkeypatch.setattr(child, "register", lambda settings: None)
    made.__init__(settings("cpu"))
    return made, llm


SAMPLING = Sampling(1.0, 1.0, 0, 0.0, 1.0, 8, False)
ANSWER = [Completion([7], truncated=False, cached=3)]


def test_each_call_gets_its_completions_and_a_dropped_one_none(process: tuple[VllmProcess, Llm]) -> None:
    made, llm = process
    for call in (11, 12, 13):
        made.add(call, Request([call], 1), SAMPLING)
    made.drop(12)
    made.drop(99)  # answered long ago
    assert made.step() == [(11, "done", ANSWER), (13, "done", ANSWER)]
    assert not made.running and not made.names
    with pytest.raises(ValueError, match="too long"):
        made.add(14, Request([1, 2, 3, 4, 5], 1), SAMPLING)
    assert not made.running and not llm.under_way


def test_what_is_cached_of_a_prompt_belongs_to_the_weights_that_wrote_it(process: tuple[VllmProcess, Llm]) -> None:
    made, llm = process
    made.add(1, Request([5], 1), SAMPLING)
    made.load_weights("a")
    made.add(2, Request([5], 1), SAMPLING)
    made.stream_weights("b", "copy")
    made.add(3, Request([5], 1), SAMPLING)
    assert len({salt for _, salt in llm.enqueued}) == 3


@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_wakes_the_engine_with_the_weights_last_loaded(
    process: tuple[VllmProcess, Llm], streamed: bool
) -> None:
    made, llm = process
    made.load_weights("shared")
    if streamed:
        made.stream_weights("buffer", "copy")
    made.sleep()
    llm.events.clear()
    for call in (1, 2):
        made.add(call, Request([5], 1), SAMPLING)
    woken = f"receive_shared {'copy' if streamed else 'shared'}"
    assert llm.events == ["wake weights", woken, "wake kv_cache", "enqueue", "enqueue"]


def test_an_engine_that_sleeps_without_weights_refuses(process: tuple[VllmProcess, Llm]) -> None:
    made, _ = process
    made.sleep()
    with pytest.raises(RuntimeError, match="never got weights"):
        made.add(1, Request([5], 1), SAMPLING)


def test_bursts_are_taken_up_before_the_next_step_and_refusals_go_to_their_call(
    process: tuple[VllmProcess, Llm], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = process
    monkeypatch.setattr(child, "VllmProcess", lambda settings: made)
    monkeypatch.setattr(made, "close", lambda: None)
    ours, theirs = Pipe()
    serving = threading.Thread(target=child.serve, args=(theirs,), daemon=True)
    serving.start()
    ours.send(settings("cpu"))
    assert ours.recv() == [(0, "done", None)]
    bad = (2, "add", (Request([1] * 5, 1), SAMPLING))
    ours.send([(1, "add", (Request([1], 1), SAMPLING)), bad, (3, "load_weights", ("w",)), (4, "add", bad[2])])
    ((two, failed, text),) = ours.recv()
    assert (two, failed) == (2, "failed") and "too long" in text
    assert ours.recv() == [(3, "done", None)]
    assert ours.recv()[0][:2] == (4, "failed")
    assert ours.recv() == [(1, "done", ANSWER)]
    ours.send([(0, "close", ())])
    serving.join(10)
    assert not serving.is_alive()
