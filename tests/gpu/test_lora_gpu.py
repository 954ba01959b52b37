"""Adapters on a GPU: partial pushes through shared memory, sleep, restarts, and compiled layers."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from gpu.waits import update_without_waiting
from samples import as_group, make_item
from tiny import engine_settings
from torch._dynamo.utils import counters

from sapo_rl.config import Config, LoraConfig, ModelConfig, RolloutConfig, TrainerConfig
from sapo_rl.config.loss import KLConfig, LossConfig
from sapo_rl.engines.parity import verify
from sapo_rl.engines.process import LocalEngine
from sapo_rl.policy.lora import LoraPolicy
from sapo_rl.policy.model import load_policy
from sapo_rl.policy.packing import pack
from sapo_rl.policy.trainer import PolicyTrainer
from sapo_rl.types import Group, Prompt
from sapo_rl.weights.ipc import IpcTransport

pytestmark = pytest.mark.gpu

IDS = [4 + i % 200 for i in range(200)]


def make_config(path: Path) -> Config:
    return Config(
        ModelConfig(path=str(path), lora=LoraConfig(rank=8, target_modules=["q_proj", "up_proj"])),
        rollout=RolloutConfig(max_completion_tokens=90),
        trainer=TrainerConfig(learning_rate=1e-3, tokens_per_micro_batch=1500),
        loss=LossConfig(kl=KLConfig(coef=0.01)),
    )


def make_trainer(path: Path) -> PolicyTrainer:
    config = make_config(path)
    policy = LoraPolicy(load_policy(config.model), config.model.lora, 0, config.model.path)
    return PolicyTrainer(policy, policy.without_adapters, config, Accelerator())


def make_groups(seed: int) -> list[Group]:
    rng = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [rng.randrange(4, 300) for _ in range(rng.randint(2, most))]

    return [
        as_group(Prompt(i, tokens(60), "", {}), *zip(*((tokens(90), rng.gauss(0, 1)) for _ in range(8)), strict=True))
        for i in range(12 + seed)
    ]


@torch.no_grad()
def score(policy: LoraPolicy) -> list[float]:
    (batch,) = pack([[make_item(IDS[:1], IDS[1:])]], len(IDS))
    return policy(batch.to(torch.device("cuda")), 1.0)[0].tolist()


def test_partial_pushes_survive_sleep_and_restart(tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model)
    policy = LoraPolicy(load_policy(config.model), config.model.lora, 0, config.model.path).cuda()
    assert isinstance(policy, LoraPolicy)
    gpu = {"device": "cuda:0", "dtype": "bfloat16", "kv_cache_bytes": 256 << 20, "sleep_level": 1}
    engine, transport = (
        LocalEngine(engine_settings(tiny_model, tmp_path / "0.log", **gpu)),
        IpcTransport(torch.bfloat16),
    )
    try:
        engine.start()
        engine.wait_ready()
        for version in (1, 2):
            with torch.no_grad():
                for _, weight in policy.trainable_weights():
                    weight.add_(0.05 * torch.randn_like(weight))
            transport.push(policy.named_weights(), [engine], version)
            assert verify(engine, IDS, score(policy), "bfloat16") < 0.05
            engine.sleep()
        assert verify(engine, IDS, score(policy), "bfloat16") < 0.05  # wakes up by itself
        (child,) = [p for p in psutil.Process().children() if "sapo_rl.engines.vllm.child" in p.cmdline()]
        child.kill()
        assert verify(engine, IDS, score(policy), "bfloat16") < 0.05
        assert engine.restarts == 1
    finally:
        engine.close()
        transport.close()


def test_layers_with_adapters_compile_whole_and_once(tiny_model: Path) -> None:
    """With the adapters on and, for the reference, off."""
    torch._dynamo.reset()
    counters.clear()
    trainer, graphs = make_trainer(tiny_model), []
    for step in range(5):
        trainer.train_on(make_groups(step), contextlib.nullcontext)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[-1] == graphs[1]
    assert not counters["graph_break"]


def test_updates_do_not_wait_for_the_device(tiny_model: Path) -> None:
    trainer = make_trainer(tiny_model)
    for _ in range(2):
        trainer.train_on(make_groups(0), contextlib.nullcontext)
    assert update_without_waiting(trainer, make_groups(0)) > 0
