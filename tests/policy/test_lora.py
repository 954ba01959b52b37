"""Adapters: what they train, what goes to vLLM and to the disk, and that the model under them stays as it is."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from pathlib import Path

import peft
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from samples import as_group
from transformers import AutoModelForCausalLM, Phi3Config

from sapo_rl.config import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    RewardConfig,
    RewardFunctionConfig,
    RolloutConfig,
    TrainerConfig,
)
from sapo_rl.config.loss import KLConfig, LossConfig
from sapo_rl.engines.build import model_facts
from sapo_rl.errors import UserError
from sapo_rl.policy import checkpoint
from sapo_rl.policy.lora import LoraPolicy, check_targets
from sapo_rl.policy.model import Policy, load_policy
from sapo_rl.policy.trainer import PolicyTrainer
from sapo_rl.run.checks import ConfigError, check
from sapo_rl.run_folder import latest_checkpoint
from sapo_rl.sizing import adapter_parameters
from sapo_rl.types import Group, Prompt

SOME = ["q_proj", "up_proj"]


def make_config(path: Path, lora: LoraConfig | None = None, **trainer: object) -> Config:
    config = Config(
        model=ModelConfig(path=str(path), dtype="float32", lora=lora or LoraConfig(rank=4)),
        rollout=RolloutConfig(batch_size=16, group_size=4, max_completion_tokens=7),
        trainer=TrainerConfig(**{"steps": 4, "learning_rate": 1e-2, "updates_per_rollout": 2, **trainer}),
    )
    config.reproducible = True
    return config


def make_policy(config: Config) -> LoraPolicy:
    policy = load_policy(config.model, config.trainer.gradient_checkpointing)
    return LoraPolicy(policy, config.model.lora, config.seed, config.model.path)


def make_trainer(config: Config, policy: Policy | None = None) -> PolicyTrainer:
    return PolicyTrainer(policy or make_policy(config), None, config, Accelerator(cpu=True))


def make_groups(seed: int) -> list[Group]:
    rng = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [rng.randrange(4, 300) for _ in range(rng.randint(1, most))]

    return [
        as_group(Prompt(i, tokens(6), "", {}), *zip(*((tokens(7), rng.gauss(0, 1)) for _ in range(4)), strict=True))
        for i in range(4)
    ]


def trained(config: Config) -> LoraPolicy:
    """A policy whose adapters have moved."""
    policy = make_policy(config)
    make_trainer(config, policy).train_on(make_groups(0), contextlib.nullcontext)
    return policy


@pytest.mark.parametrize("targets", [["all-linear"], SOME])
def test_pushed_weights_are_the_merged_ones(tiny_model: Path, targets: list[str]) -> None:
    policy = trained(make_config(tiny_model, LoraConfig(rank=4, alpha=6.0, target_modules=targets)))
    pushed = {name: weight.clone() for name, weight in policy.named_weights()}
    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    tuner = peft.PeftModel(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), policy._description)
    tuner.load_state_dict({f"base_model.model.{n}": w for n, w in policy.model.state_dict().items()}, strict=True)
    expected = tuner.merge_and_unload().state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close((original | pushed)[name], weight, atol=1e-6, rtol=0)
    changed = {name for name in expected if not torch.equal(expected[name], original[name])}
    endings = {name.split(".")[-2] for name in changed}
    # Whole attention and feed-forward blocks: vLLM holds query, key and value, gate and up in one tensor each.
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert endings == (set(SOME) if targets == SOME else linear)
    assert {name.split(".")[-2] for name in pushed} == linear and len(pushed) == 2 * 7


def test_adapters_that_are_pushed_alone_add_what_merged_ones_do(tiny_model: Path) -> None:
    config = make_config(tiny_model, LoraConfig(rank=4, alpha=6.0, sync="adapter"))
    policy = trained(config)
    pushed, merged = dict(policy.named_weights()), dict(policy.merged_weights())
    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    assert len(pushed) == 2 * 14 and sum(weight.numel() for weight in pushed.values()) < 20_000
    for name, weight in merged.items():
        path = name.removesuffix(".weight")
        added = pushed[f"{path}.lora_B.weight"] @ pushed[f"{path}.lora_A.weight"]
        torch.testing.assert_close(weight, original[name] + added, atol=1e-6, rtol=0)
    assert dict(policy.state()).keys() >= merged.keys()  # what is saved at the end is merged all the same


def test_training_starts_at_the_whole_models_loss_and_moves_the_adapters_alone(tiny_model: Path) -> None:
    config = make_config(tiny_model, updates_per_rollout=1)
    policy = make_policy(config)
    before = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    found = make_trainer(config, policy).train_on(make_groups(1), contextlib.nullcontext)
    whole = make_trainer(config, load_policy(dataclasses.replace(config.model, lora=LoraConfig())))
    expected = whole.train_on(make_groups(1), contextlib.nullcontext)
    for name in ("policy/loss", "policy/entropy"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6)
    assert 0 < found["policy/grad_norm"] < expected["policy/grad_norm"]
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(weight, before[name]) == ("lora_B" not in name), name  # A has no gradient while B is zero
    assert {weight.dtype for _, weight in policy.trainable_weights()} == {torch.float32}


def test_frozen_weights_are_held_in_the_compute_dtype(tiny_model: Path) -> None:
    config = make_config(tiny_model)
    config.model.dtype = "bfloat16"
    policy = trained(config)
    dtypes = {name: weight.dtype for name, weight in policy.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {torch.bfloat16}


def test_first_values_depend_on_the_seed_alone(tiny_model: Path) -> None:
    """All ranks start alike, whatever their own generators, which are left as they were."""
    config = make_config(tiny_model)
    found = []
    for state, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(state)
        config.seed = seed
        found.append(torch.cat([weight.flatten() for _, weight in make_policy(config).trainable_weights()]))
        drawn = torch.rand(1)
        torch.manual_seed(state)
        assert torch.equal(torch.rand(1), drawn)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_gradient_checkpointing_and_micro_batches_change_nothing(tiny_model: Path) -> None:
    found = []
    for changes in ({}, {"gradient_checkpointing": True}, {"tokens_per_micro_batch": 20}):
        policy = trained(make_config(tiny_model, None, **changes))
        found.append(torch.cat([weight.flatten() for _, weight in policy.trainable_weights()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=2e-5, rtol=0)


def test_reference_is_the_model_without_adapters(tiny_model: Path) -> None:
    config = make_config(tiny_model, mini_batches=1)
    config.loss = LossConfig(kl=KLConfig(coef=0.5))
    found = []
    for second in (False, True):
        policy = make_policy(config)
        reference = load_policy(config.model) if second else policy.without_adapters
        trainer = PolicyTrainer(policy, reference, config, Accelerator(cpu=True))
        metrics = [trainer.train_on(make_groups(step), contextlib.nullcontext) for step in range(2)]
        found.append((metrics, torch.cat([weight.flatten() for _, weight in policy.trainable_weights()])))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][0][0]["policy/kl_ref"] > 0


def test_checkpoint_holds_the_adapters_and_continues_to_the_last_bit(tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model)
    whole = make_trainer(config)
    expected = [whole.train_on(make_groups(step), contextlib.nullcontext) for step in range(3)][1:]
    first = make_trainer(config)
    first.train_on(make_groups(0), contextlib.nullcontext)
    checkpoint.save(tmp_path, 1, first, {}, keep_last=1)
    (file,) = tmp_path.glob("*/trainer_00000.safetensors")
    saved = {name for name in load_file(file) if name.startswith("weight/")}
    assert len(saved) == 2 * 7 * 2 and all("lora_" in name for name in saved)
    second = make_trainer(config)
    assert checkpoint.load(latest_checkpoint(tmp_path), second) == (1, {})
    assert [second.train_on(make_groups(step), contextlib.nullcontext) for step in (1, 2)] == expected
    other = make_trainer(make_config(tiny_model, LoraConfig(rank=8)))
    shapes = {name: weight.shape for name, weight in other.policy.trainable_weights()}
    with pytest.raises(UserError, match="another model"):
        checkpoint.check(latest_checkpoint(tmp_path), shapes, other.accelerator)


def test_export_is_a_plain_model_with_the_adapters_beside(tiny_model: Path, tmp_path: Path) -> None:
    policy = trained(make_config(tiny_model, LoraConfig(rank=4, target_modules=SOME)))
    policy.export(tmp_path / "final")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        start = plain(ids).logits
        adapted = peft.PeftModel.from_pretrained(plain, str(tmp_path / "final/adapter"))(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=0)
    assert (merged - start).abs().max() > 0.01


@pytest.mark.parametrize("wrong", ["q_prj", "lm_head", "embed_tokens", "self_attn"])
def test_module_that_cannot_be_adapted_is_named_with_those_that_can(tiny_model: Path, wrong: str) -> None:
    config = ModelConfig(path=str(tiny_model), lora=LoraConfig(rank=4, target_modules=["v_proj", wrong]))
    with pytest.raises(UserError, match=rf"target_modules.*'{wrong}'.*valid: all-linear, down_proj, .*, v_proj$"):
        check_targets(config)


def test_settings_that_cannot_be_are_refused(tiny_model: Path) -> None:
    config = make_config(tiny_model)
    config.data = DataConfig(source="arithmetic", max_prompt_tokens=64)
    config.reward = RewardConfig({"exact": RewardFunctionConfig("exact_match")})
    check(config)
    config.rollout.sleep = "2"
    with pytest.raises(ConfigError, match=r"rollout\.sleep: 2 .*set auto, 0 or 1"):
        check(config)
    config.rollout.sleep = "auto"
    config.model.lora.target_modules = []
    with pytest.raises(ConfigError, match=r"model\.lora\.target_modules: is empty"):
        check(config)


def test_adapters_do_not_go_alone_where_vllm_cannot_take_them(tiny_model: Path) -> None:
    config = make_config(tiny_model, LoraConfig(rank=512, sync="adapter"))
    config.data = DataConfig(source="arithmetic", max_prompt_tokens=64)
    config.reward = RewardConfig({"exact": RewardFunctionConfig("exact_match")})
    check(config)
    config.model.lora.rank = 513
    with pytest.raises(ConfigError, match=r"model\.lora\.rank: is 513; model\.lora\.sync=adapter goes up to 512"):
        check(config)
    config.model.lora.rank, config.rollout.servers = 8, ["127.0.0.1:8000"]
    with pytest.raises(ConfigError, match=r"model\.lora\.sync: 'adapter' does not reach rollout\.servers; set merged"):
        check(config)
    check(config, training=False)  # a model that is measured is a merged one
    config.rollout.servers, config.rollout.engine.name = [], "sapo_rl.engines.process.LocalEngine"
    with pytest.raises(ConfigError, match=r"model\.lora\.sync: 'adapter' is for vLLM; .*LocalEngine' gets weights"):
        check(config)


@pytest.mark.parametrize("targets", [["all-linear"], SOME])
def test_estimate_counts_the_adapters(tiny_model: Path, targets: list[str]) -> None:
    config = make_config(tiny_model, LoraConfig(rank=3, target_modules=targets))
    counted = sum(weight.numel() for _, weight in make_policy(config).trainable_weights())
    assert adapter_parameters(config, model_facts(config.model).linear) == counted


def test_estimate_counts_the_adapters_of_modules_with_names_of_their_own(tmp_path: Path) -> None:
    shape = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    Phi3Config(**shape, **heads).save_pretrained(tmp_path)
    config = make_config(tmp_path, LoraConfig(rank=3, target_modules=["qkv_proj", "gate_up_proj"]))
    qkv, gate_up = 32 + (4 + 2 + 2) * 8, 32 + 2 * 48
    assert adapter_parameters(config, model_facts(config.model).linear) == 3 * 2 * (qkv + gate_up)
