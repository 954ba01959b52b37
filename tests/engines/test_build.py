"""How many engines, how much memory, what sleeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sapo_rl.config import Config, RolloutConfig
from sapo_rl.engines.build import (
    Device,
    ModelFacts,
    build_engines,
    build_transport,
    cache_bytes,
    engine_count,
    engine_settings,
    model_facts,
    sleep_level,
)
from sapo_rl.engines.remote import RemoteEngine
from sapo_rl.errors import UserError
from sapo_rl.run.checks import ConfigError, check
from sapo_rl.sizing import adapter_parameters
from sapo_rl.weights.broadcast import NcclTransport
from sapo_rl.weights.buckets import BucketTransport
from sapo_rl.weights.file import FileTransport
from sapo_rl.weights.ipc import IpcTransport

GIB = 2**30
H200 = Device("cuda:0", 140 * GIB)
CPU = Device("cpu", 0)


def facts(parameters: float, layers: int = 24, width: int = 896) -> ModelFacts:
    """A model with two key-value heads of 64 a layer."""
    shape = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": 151936}
    return ModelFacts(int(parameters), 2 * layers * 2 * 64, shape)


SMALL = facts(0.5e9)


def config(tokens: int = 1024, **rollout: object) -> Config:
    made = Config()
    made.data.max_prompt_tokens, made.rollout.max_completion_tokens = 256, tokens - 256
    for name, value in rollout.items():
        setattr(made.rollout, name, value)
    return made


def test_facts_are_those_of_the_model(tiny_model: Path) -> None:
    made = Config()
    made.model.path = str(tiny_model)
    found = model_facts(made.model)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert found.parameters == sum(weight.numel() for weight in model.parameters())
    assert found.cache_elements == 2 * 2 * 1 * 32
    assert found.shape["vocab_size"] == model.config.vocab_size
    made.model.path = str(tiny_model / "nowhere")
    with pytest.raises(UserError, match=r"model.path: cannot read"):
        model_facts(made.model)


def test_the_cache_holds_all_sequences_where_there_is_room() -> None:
    per_token = 2 * 24 * 2 * 64 * 2
    assert cache_bytes(config(max_num_seqs=128), SMALL, H200.memory, 2) == 128 * (1024 + 16) * per_token


def test_the_cache_stays_within_the_engines_share() -> None:
    many = config(max_num_seqs=4096, gpu_memory_utilization=0.35)
    found = cache_bytes(many, SMALL, H200.memory, 2)
    assert found is not None
    assert 0 < found < 0.35 * H200.memory / 2 - 2 * SMALL.parameters
    whole = cache_bytes(many, SMALL, H200.memory, 1)
    assert whole is not None
    assert whole - found == pytest.approx(0.35 * H200.memory / 2, abs=1)


def test_vllm_measures_where_the_share_is_too_small() -> None:
    assert cache_bytes(config(), SMALL, 8 * GIB, 1) is None


@pytest.mark.parametrize(
    ("chosen", "parameters", "device", "expected"),
    [
        ("auto", 135e6, H200, 2),
        ("auto", 1.5e9, H200, 1),
        ("auto", 135e6, CPU, 1),
        ("auto", 135e6, Device("cuda:0", 16 * GIB), 1),
        ("3", 7e9, H200, 3),
        ("2", 135e6, CPU, 2),
    ],
)
def test_small_models_get_two_engines(chosen: str, parameters: float, device: Device, expected: int) -> None:
    assert engine_count(config(engines_per_gpu=chosen), facts(parameters), device) == expected


@pytest.mark.parametrize(
    ("chosen", "mode", "parameters", "device", "expected"),
    [
        ("auto", "sync", 0.5e9, H200, 0),
        ("auto", "sync", 7e9, H200, 2),
        ("auto", "overlap", 7e9, H200, 0),
        ("1", "sync", 0.5e9, H200, 1),
        ("0", "sync", 7e9, H200, 0),
        ("2", "sync", 7e9, CPU, 0),
    ],
)
def test_engines_sleep_where_both_do_not_fit(
    chosen: str, mode: str, parameters: float, device: Device, expected: int
) -> None:
    assert sleep_level(config(sleep=chosen, mode=mode), facts(parameters), device) == expected


def test_with_adapters_a_sleeping_engine_keeps_its_weights() -> None:
    """What has no adapter is never sent: after level 2 it would be lost."""
    made = config(sleep="auto")
    made.model.lora.rank = 16
    assert sleep_level(made, facts(7e9), H200) == 0  # 14 GB of frozen weights where training all takes 112
    assert sleep_level(made, facts(60e9), H200) == 1


def test_an_engine_makes_room_for_adapters_that_come_alone() -> None:
    linear = {"q_proj": 32 * 8192, "up_proj": 32 * 15104}
    made, model = config(gpu_memory_utilization=0.5), replace(facts(7e9), adapted=tuple(linear), linear=linear)
    made.model.lora.rank = 48
    (merged,) = engine_settings(made, model, H200, Path("logs"), [0], "rank/")
    made.model.lora.sync, made.rollout.max_num_seqs = "adapter", 4096  # so that the cache takes all that is left
    (alone,) = engine_settings(made, model, H200, Path("logs"), [0], "rank/")
    made.model.lora.sync = "merged"
    (same,) = engine_settings(made, model, H200, Path("logs"), [0], "rank/")
    assert (merged.lora_rank, alone.lora_rank, alone.lora_modules) == (0, 48, ("q_proj", "up_proj"))
    adapters = adapter_parameters(made, linear) * 64 / 48  # vLLM has no room of that rank but of the next
    assert (
        same.kv_cache_bytes - alone.kv_cache_bytes == pytest.approx(2 * adapters, abs=1) and adapters == 64 * 32 * 23296
    )


def test_an_engine_cannot_sleep_and_write() -> None:
    with pytest.raises(UserError, match=r"rollout.sleep: 2.*rollout.mode=overlap"):
        sleep_level(config(sleep="2", mode="overlap"), SMALL, H200)


def test_engines_differ_in_seed_and_log_and_share_the_memory() -> None:
    made = config(engines_per_gpu="2", gpu_memory_utilization=0.5)
    first, second = engine_settings(made, SMALL, H200, Path("logs"), [0], "vllm_rank3/")
    assert [first.log_path.name, second.log_path.name] == ["vllm_rank3.log", "vllm_rank3_1.log"]
    assert first.gpu_memory_utilization == second.gpu_memory_utilization == 0.25
    assert first.max_model_len == 1024
    resumed = engine_settings(made, SMALL, H200, Path("logs"), [0], "vllm_rank3/step_5")
    other = engine_settings(made, SMALL, H200, Path("logs"), [0], "vllm_rank4/")
    assert len({one.seed for one in (first, second, *resumed, *other)}) == 6


@pytest.mark.parametrize(
    ("engines", "device", "expected"), [("1", H200, [True]), ("2", H200, [False, False]), ("1", CPU, [False])]
)
def test_an_engine_alone_on_its_gpu_has_a_core_beside_it(engines: str, device: Device, expected: list[bool]) -> None:
    """Two engines fill each other's pauses, and start in half the time without."""
    made = engine_settings(config(engines_per_gpu=engines), SMALL, device, Path("logs"), [0], "vllm_rank0/")
    assert [one.core_process for one in made] == expected


def test_the_transport_follows_the_device() -> None:
    assert isinstance(build_transport(config(), SMALL, H200, "run", True), IpcTransport)
    big = ModelFacts(3_000_000_000, 1000, {}, largest=600_000_000)
    for made, kind in (
        (config(sync_buffer_gb=4.0), BucketTransport),
        (config(), IpcTransport),
        (config(sync_buffer_gb=6.0), IpcTransport),
    ):
        transport = build_transport(made, big, H200, "run", True)
        assert isinstance(transport, kind)
        transport.close()
    assert isinstance(build_transport(config(tensor_parallel=2, transport="ipc"), big, H200, "run", True), IpcTransport)
    for made, device in ((config(), CPU), (config(transport="file"), H200)):
        transport = build_transport(made, facts(1000), device, "run", True)
        assert isinstance(transport, FileTransport)
        assert transport.dtype == torch.bfloat16
        transport.close()
    with pytest.raises(UserError, match=r"rollout.transport: ipc needs a GPU"):
        build_transport(config(transport="ipc"), SMALL, CPU, "run", True)


def test_servers_take_the_place_of_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPO_API_KEY", "a_secret_of_letters")
    made = config(servers=["127.0.0.1:8000", "there:9000"])
    engines = build_engines(made, SMALL, CPU, Path("logs"), [5], "vllm_rank0/")
    assert all(isinstance(engine, RemoteEngine) for engine in engines)
    settings = [engine.settings for engine in engines if isinstance(engine, RemoteEngine)]
    assert [(one.address, one.key, one.max_model_len, one.stop_token_ids) for one in settings] == [
        ("127.0.0.1:8000", "a_secret_of_letters", 1024, [5]),
        ("there:9000", "a_secret_of_letters", 1024, [5]),
    ]
    transport = build_transport(made, SMALL, CPU, "run", True)
    assert isinstance(transport, NcclTransport)
    assert transport.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("mode", "servers", "staleness", "expected"),
    [
        ("auto", [], 1, False),
        ("auto", ["a:1"], 1, True),
        ("sync", ["a:1"], 1, False),
        ("overlap", [], 1, True),
        ("overlap", ["a:1"], 0, False),
    ],
)
def test_servers_write_ahead_unless_told_otherwise(
    mode: str, servers: list[str], staleness: int, expected: bool
) -> None:
    assert RolloutConfig(mode=mode, servers=servers, max_staleness=staleness).overlaps is expected


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ({"servers": ["nowhere"]}, r"rollout.servers: 'nowhere' is no address; valid: host:port"),
        ({"servers": ["a:70000"]}, r"rollout.servers: 'a:70000'"),
        ({"servers": ["a:1", "a:1"]}, r"rollout.servers: names a server twice"),
        ({"servers": ["a:1"], "transport": "ipc"}, r"rollout.transport: 'ipc' does not reach rollout.servers"),
        ({"servers": ["a:1"], "sleep": "2"}, r"rollout.sleep: is 2; rollout.servers never sleep"),
        ({"transport": "nccl"}, r"rollout.transport: 'nccl' is for rollout.servers"),
    ],
)
def test_what_cannot_be_with_servers_is_refused(rollout: dict[str, object], words: str) -> None:
    made = config(**rollout)
    made.data.source, made.model.path = "arithmetic", "some/model"
    with pytest.raises(ConfigError, match=words):
        check(made)


def test_running_out_of_memory_names_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sapo_rl.run import rank

    def build(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nProcess 1 has ...")

    monkeypatch.setattr(rank, "meet", build)
    with pytest.raises(SystemExit) as stopped:
        rank.main(tmp_path)
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    for name in (
        "trainer.tokens_per_micro_batch",
        "rollout.gpu_memory_utilization",
        "rollout.sync_buffer_gb",
        "rollout.sleep=1",
        "2.00 GiB",
    ):
        assert name in told
    assert len(told.splitlines()) == 2
