"""Adapters in whole runs, and in vLLM: a tiny random model on the CPU, float32."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import forked
import pandas as pd
import pytest
import torch
from command import steps_of, timeless
from safetensors.torch import load_file
from samples import make_item
from tiny import engine_settings, generate, make_workspace
from transformers import AutoModelForCausalLM, AutoTokenizer

from sapo_rl.config import LoraConfig, ModelConfig
from sapo_rl.engines.base import Completion, Request, Sampling
from sapo_rl.engines.parity import verify
from sapo_rl.engines.process import LocalEngine
from sapo_rl.errors import UserError
from sapo_rl.policy.lora import LoraPolicy, check_targets
from sapo_rl.policy.model import load_policy
from sapo_rl.policy.packing import pack
from sapo_rl.weights.file import FileTransport, weights_folder

pytestmark = pytest.mark.e2e

PARTS = ["q_proj", "up_proj"]
"""Of the weights that vLLM fuses, one each: the others must reach it, too."""
LONG = Sampling(1.0, 1.0, 0, 0.0, 1.0, 200, True)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_workspace(
        tmp_path_factory.mktemp("workspace"),
        tiny_model,
        model={"lora": {"rank": 8, "target_modules": PARTS}},
        rollout={"verify_every": 1},
        loss={"kl": {"coef": 0.01}},
        trainer={"steps": 3, "learning_rate": 1e-2},
        eval={"prompts": 0},
        checkpoint={"every": 2},
        logging={"wandb": "off"},
    )


@pytest.fixture(scope="module")
def whole(workspace: Path) -> Path:
    return forked.new_run(workspace)


@pytest.fixture(scope="module")
def alone(workspace: Path) -> Path:
    """The same run with adapters that vLLM gets alone, resumed after its second step."""
    folder = forked.new_run(workspace, "trainer.steps=2", "model.lora.sync=adapter")
    code, out, err = forked.run(workspace, f"resume={folder}", "trainer.steps=3")
    assert code == 0, out + err
    return folder


def test_adapters_that_go_to_vllm_alone_train_as_merged_ones_do(alone: Path, whole: Path) -> None:
    probes = [record["mismatch/probe_logp_diff"] for record in timeless(alone) if "mismatch/probe_logp_diff" in record]
    assert len(probes) == 4 and max(probes) < 1e-5
    ours, theirs = (load_file(f / "checkpoints/step_000003/trainer_00000.safetensors") for f in (alone, whole))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=1e-3)
    steps = zip(steps_of(alone), steps_of(whole), strict=True)
    assert all(one["reward/mean"] == pytest.approx(other["reward/mean"]) for one, other in steps)


def test_vllm_runs_the_adapted_model_at_every_step(whole: Path) -> None:
    probes = [record["mismatch/probe_logp_diff"] for record in timeless(whole) if "mismatch/probe_logp_diff" in record]
    assert len(probes) == 4 and max(probes) < 1e-5
    steps = steps_of(whole)
    assert len(steps) == 3 and steps[-1]["policy/kl_ref"] > 1e-4  # it has moved away from the model without adapters
    saved = load_file(whole / "checkpoints/step_000003/trainer_00000.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert "Failed to load weights" not in (whole / "logs/vllm_rank0.log").read_text()


def test_final_model_is_the_trained_one(whole: Path, tiny_model: Path) -> None:
    final = AutoModelForCausalLM.from_pretrained(whole / "final", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    changed = {
        name.split(".")[-2] for name, weight in final.state_dict().items() if not torch.equal(weight, start[name])
    }
    assert changed == set(PARTS)


def test_checkpoints_with_adapters_are_measured_as_the_merged_model_is(
    workspace: Path, alone: Path, tiny_model: Path
) -> None:
    models = f"model={alone}/final,{alone}/checkpoints/step_000003,{tiny_model}"  # vLLM loads the first by itself
    own = "eval.sets.own={data: {source: arithmetic}, prompts: 6}"
    how = {"module": "sapo_rl.run.eval", "begin": forked.launch}
    code, out, err = forked.run(workspace, models, own, "run_dir=measured", **how)
    assert code == 0 and out.count("vLLM is ready") == 1, out + err
    files = sorted((workspace / "measured/completions").glob("*.parquet"))
    merged, checkpoint, before = (pd.read_parquet(file) for file in files)
    texts = merged.completion.to_list()
    assert checkpoint.completion.to_list() == texts != before.completion.to_list() and len(texts) == 6
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    final = AutoModelForCausalLM.from_pretrained(alone / "final", dtype=torch.float32)
    for row in merged.itertuples():
        ids = tokenizer.apply_chat_template([{"role": "user", "content": row.prompt}], add_generation_prompt=True)
        ids = ids["input_ids"]
        expected = final.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8)[0, len(ids) :]
        assert row.completion == tokenizer.decode(expected, skip_special_tokens=True)


def test_what_ended_after_two_steps_and_is_resumed_equals_three_to_the_last_bit(
    workspace: Path, whole: Path, tmp_path: Path
) -> None:
    gone = shutil.ignore_patterns("final", "step_000003")
    folder = shutil.copytree(whole, tmp_path / "copy", symlinks=True, ignore=gone)
    code, out, err = forked.run(workspace, f"resume={folder}")
    assert code == 0, out + err
    assert timeless(folder) == timeless(whole)
    ours, theirs = (load_file(f / "checkpoints/step_000003/trainer_00000.safetensors") for f in (folder, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_engine_that_dies_comes_back_with_the_weights_of_a_partial_push(tiny_model: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=str(tiny_model), dtype="float32", lora=LoraConfig(rank=8, target_modules=PARTS))
    policy = LoraPolicy(load_policy(config), config.lora, 0, config.path)
    transport = FileTransport(weights_folder(1 << 20), torch.float32)
    engine = LocalEngine(engine_settings(tiny_model, tmp_path / "engine.log"))
    ids = list(range(5, 45))
    try:
        engine.start()
        engine.wait_ready()
        for version in (1, 2):
            change(policy)
            transport.push(policy.named_weights(), [engine], version)
            expected = score(policy, ids)
            assert verify(engine, ids, expected, "float32") < 1e-5
        forked.engine_with(engine.settings.log_path).kill()
        assert verify(engine, ids, expected, "float32") < 1e-5
        assert engine.restarts == 1
    finally:
        engine.close()
        transport.close()


def test_adapters_are_replaced_under_running_completions(tiny_model: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=str(tiny_model), dtype="float32", lora=LoraConfig(rank=12, alpha=7, sync="adapter"))
    policy = LoraPolicy(load_policy(config), config.lora, 0, config.path)
    transport = FileTransport(weights_folder(1 << 20), torch.float32)
    engine = LocalEngine(
        engine_settings(
            tiny_model, tmp_path / "engine.log", lora_rank=12, lora_modules=tuple(check_targets(config)),
            max_model_len=512,
        )
    )  # fmt: skip
    prompt, mixed = [4 + i % 200 for i in range(150)], False  # longer than a block of the cache of keys and values
    try:
        engine.start()
        engine.wait_ready()
        assert verify(engine, prompt, score(policy, prompt), "float32") < 1e-5  # none yet: they begin as zero
        for version in range(1, 4):
            (under_way,) = engine.submit([Request(prompt, 4)], LONG)
            engine.score(prompt)  # now it has begun
            begun_by = copy.deepcopy(policy.model.state_dict())
            change(policy)
            transport.push(policy.named_weights(), [engine], version)
            assert verify(engine, prompt, score(policy, prompt), "float32") < 1e-5
            for _ in range(2):  # the second time by what the cache has
                ((one,),) = generate(engine, [Request(prompt, 1)], LONG)
                assert furthest(policy, prompt, one) < 1e-4
            now = copy.deepcopy(policy.model.state_dict())
            policy.model.load_state_dict(begun_by)
            for one in under_way.result(120):
                assert furthest(policy, prompt, one, tokens=1) < 1e-4
                mixed |= furthest(policy, prompt, one) > 0.01
            policy.model.load_state_dict(now)
        assert mixed  # some were ended by newer adapters than they were begun by
        forked.engine_with(engine.settings.log_path).kill()
        assert verify(engine, prompt, score(policy, prompt), "float32") < 1e-5
        assert engine.restarts == 1
        wrong = {f"model.layers.0.self_attn.x_proj.lora_{kind}.weight": torch.zeros(12, 12) for kind in "AB"}
        with pytest.raises(UserError, match=r"lora\.sync: vLLM has no place for adapters of .*x_proj; set merged"):
            FileTransport(weights_folder(1 << 20), torch.float32).push(wrong.items(), [engine], 4)
    finally:
        engine.close()
        transport.close()


@torch.no_grad()
def change(policy: LoraPolicy) -> None:
    for _, weight in policy.trainable_weights():
        weight.add_(0.05 * torch.randn_like(weight))


def furthest(policy: LoraPolicy, prompt: list[int], one: Completion, tokens: int | None = None) -> float:
    """The largest difference of vLLM's log-probabilities of a completion, or of its first tokens, from the policy's."""
    ids = one.token_ids[:tokens]
    pairs = zip(one.logps or (), score(policy, prompt + ids)[len(prompt) - 1 :], strict=False)
    return max(abs(ours - theirs) for ours, theirs in pairs)


@torch.no_grad()
def score(policy: LoraPolicy, ids: list[int]) -> list[float]:
    (batch,) = pack([[make_item(ids[:1], ids[1:])]], len(ids))
    return policy(batch, 1.0)[0].tolist()
