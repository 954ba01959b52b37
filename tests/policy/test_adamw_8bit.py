"""AdamW with moments of eight bits: near AdamW, in a third of its memory, and continued to the last bit."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from samples import as_group

from sapo_rl.config import Config, DataConfig, ModelConfig, RewardConfig, RewardFunctionConfig, TrainerConfig
from sapo_rl.errors import UserError
from sapo_rl.policy import checkpoint
from sapo_rl.policy.model import load_policy
from sapo_rl.policy.trainer import PolicyTrainer
from sapo_rl.run.checks import ConfigError, check
from sapo_rl.run_folder import latest_checkpoint
from sapo_rl.sizing import trainer_memory
from sapo_rl.types import Group, Prompt

sys.path.extend(filter(None, [os.environ.get("TORCHAO")]))  # scripts/test.sh has it in a folder of its own
pytest.importorskip("torchao")


def make_config(path: Path, optimizer: str = "adamw_8bit", **trainer: object) -> Config:
    settings = {"steps": 4, "learning_rate": 1e-3, "weight_decay": 0.1, "warmup_updates": 3, "schedule": "cosine"}
    return Config(
        model=ModelConfig(path=str(path), dtype="float32"),
        data=DataConfig(source="arithmetic", max_prompt_tokens=64),
        reward=RewardConfig({"exact": RewardFunctionConfig("exact_match")}),
        trainer=TrainerConfig(optimizer=optimizer, **(settings | trainer)),
    )


def make_trainer(config: Config) -> PolicyTrainer:
    return PolicyTrainer(load_policy(config.model), None, config, Accelerator(cpu=True))


def train(trainer: PolicyTrainer, *seeds: int) -> list[dict[str, float]]:
    return [trainer.train_on(make_groups(seed), contextlib.nullcontext) for seed in seeds]


def make_groups(seed: int) -> list[Group]:
    rng = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [rng.randrange(4, 300) for _ in range(rng.randint(1, most))]

    return [
        as_group(Prompt(i, tokens(6), "", {}), *zip(*((tokens(7), rng.gauss(0, 1)) for _ in range(4)), strict=True))
        for i in range(4)
    ]


def weights(trainer: PolicyTrainer) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in trainer.policy.parameters()])


def test_weights_go_where_adamw_takes_them(tiny_model: Path) -> None:
    ours, theirs = (make_trainer(make_config(tiny_model, name)) for name in ("adamw_8bit", "adamw"))
    start = weights(ours)
    found, expected = train(ours, 0, 1, 2), train(theirs, 0, 1, 2)
    for name, digits in (("policy/learning_rate", 1e-9), ("policy/loss", 1e-3)):
        assert [one[name] for one in found] == pytest.approx([one[name] for one in expected], abs=digits)
    moved, wanted = weights(ours) - start, weights(theirs) - start
    assert torch.cosine_similarity(moved, wanted, dim=0) > 0.99 and not torch.equal(moved, wanted)


def test_a_checkpoint_holds_the_moments_as_they_are_and_continues_to_the_last_bit(
    tiny_model: Path, tmp_path: Path
) -> None:
    whole = make_trainer(make_config(tiny_model))
    expected = train(whole, 0, 1, 2)[1:]
    first = make_trainer(make_config(tiny_model))
    train(first, 0)
    checkpoint.save(tmp_path, 1, first, {}, keep_last=1)
    (file,) = tmp_path.glob("*/trainer_00000.safetensors")
    saved = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"  # 128 x 64: 32 blocks
    assert saved[f"exp_avg.codes/{name}"].dtype == torch.uint8 and saved[f"exp_avg_sq.scale/{name}"].shape == (32,)
    moments = sum(tensor.nbytes for key, tensor in saved.items() if key.startswith("exp_avg"))
    half = [p.numel() for p in first.policy.parameters() if p.numel() >= 4096 and p.numel() % 256 == 0]
    rest = sum(p.numel() for p in first.policy.parameters()) - sum(half)
    assert moments == 2 * (sum(half) + sum(half) // 256 * 4) + 8 * rest
    second = make_trainer(make_config(tiny_model))
    assert checkpoint.load(latest_checkpoint(tmp_path), second) == (1, {})
    assert train(second, 1, 2) == expected
    assert torch.equal(weights(second), weights(whole))


def test_estimate_counts_ten_bytes_a_weight(tiny_model: Path) -> None:
    taken = [
        next(
            value
            for use, value in trainer_memory(make_config(tiny_model, name), 10**9, {}, 0).items()
            if "AdamW" in use
        )
        for name in ("adamw", "adamw_8bit")
    ]
    assert taken == [16e9, 10e9]


def test_it_is_refused_where_weights_are_sharded_or_torchao_is_missing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tiny_model)
    check(config)
    config.launch.profile, config.launch.num_processes = "fsdp2", 2
    with pytest.raises(
        ConfigError, match=r"optimizer: adamw_8bit is not for sharded weights \(launch\.profile=fsdp2\)"
    ):
        check(config)
    own = tmp_path / "own.yaml"
    for kind in ("FSDP", "DEEPSPEED"):
        own.write_text(f"distributed_type: {kind}\n")
        config.launch.profile = str(own)
        with monkeypatch.context() as patch:
            patch.setattr("importlib.util.find_spec", lambda name: True)  # DeepSpeed
            with pytest.raises(ConfigError, match=rf"optimizer: .* sharded weights \(launch\.profile={own}\)"):
                check(config)
    own.write_text("distributed_type: MULTI_GPU\n")
    check(config)
    config.launch.profile = "fsdp2"
    with monkeypatch.context() as patch:  # under a launcher of the user's own
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        with pytest.raises(UserError, match=r"trainer\.optimizer: adamw_8bit is not for sharded weights"):
            make_trainer(config)
    config.launch.profile, config.launch.num_processes = "single", 1
    monkeypatch.setattr("sapo_rl.plugins.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"adamw_8bit needs torchao: pip install 'sapo-train\[torchao\]'"):
        check(config)
