"""Adapters in whole runs, and in vLLM: a tiny random model on the CPU, float32."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from command import new_run, run, steps_of, timeless
from safetensors.torch import load_file
from samples import make_item
from tiny import engine_settings, generate, make_workspace
from transformers import AutoModelForCausalLM

from sapo_rl.config import LoraConfig, ModelConfig
from sapo_rl.engines.base import Request, Sampling
from sapo_rl.engines.parity import verify
from sapo_rl.engines.process import LocalEngine
from sapo_rl.policy.lora import LoraPolicy
from sapo_rl.policy.model import load_policy
from sapo_rl.policy.packing import pack
from sapo_rl.weights.file import FileTransport, weights_folder

pytestmark = pytest.mark.e2e

PARTS = ["q_proj", "up_proj"]
"""Of the weights that vLLM fuses, one each: the others must reach it, too."""


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
    return new_run(workspace)


def test_vllm_runs_the_adapted_model_at_every_step(whole: Path) -> None:
    probes = [record["mismatch/probe_logp_diff"] for record in timeless(whole) if "mismatch/probe_logp_diff" in record]
    assert len(probes) == 4 and max(probes) < 1e-5
    steps = steps_of(whole)
    assert len(steps) == 3 and steps[-1]["policy/kl_ref"] > 1e-4  # it has moved away from the model without adapters
    saved = load_file(whole / "checkpoints/step_000003/trainer_00000.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert "Failed to load weights" not in (whole / "logs/vllm_rank0.log").read_text()


def test_final_model_is_the_trained_one_for_transformers_and_vllm(whole: Path, tiny_model: Path) -> None:
    final = AutoModelForCausalLM.from_pretrained(whole / "final", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    changed = {
        name.split(".")[-2] for name, weight in final.state_dict().items() if not torch.equal(weight, start[name])
    }
    assert changed == set(PARTS)
    ids = list(range(5, 25))
    expected = final.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0, len(ids) :].tolist()
    engine = LocalEngine(engine_settings(whole / "final", whole / "logs" / "final.log"))
    try:
        engine.start()
        engine.wait_ready()
        ((found,),) = generate(engine, [Request(ids, 1)], Sampling(0.0, 1.0, 0, 0.0, 1.0, 12, False))
    finally:
        engine.close()
    assert found.token_ids == expected


def test_checkpoints_with_adapters_are_measured_as_the_merged_model_is(
    workspace: Path, whole: Path, tiny_model: Path
) -> None:
    models = f"model={whole}/checkpoints/step_000003,{whole}/final,{tiny_model}"
    own = "eval.sets.own={data: {source: arithmetic}, prompts: 6}"
    code, out, err = run(workspace, models, own, "run_dir=measured", module=("-m", "sapo_rl.run.eval"))
    assert code == 0 and out.count("vLLM is ready") == 1, out + err
    files = sorted((workspace / "measured/completions").glob("*.parquet"))
    checkpoint, merged, before = (pd.read_parquet(file).completion.to_list() for file in files)
    assert checkpoint == merged != before and len(before) == 6


def test_two_steps_a_resume_and_one_more_equal_three_to_the_last_bit(workspace: Path, whole: Path) -> None:
    folder = new_run(workspace, "trainer.steps=2")
    assert folder != whole
    code, out, err = run(workspace, f"resume={folder.relative_to(workspace)}", "trainer.steps=3")
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
            with torch.no_grad():
                for _, weight in policy.trainable_weights():
                    weight.add_(0.05 * torch.randn_like(weight))
            transport.push(policy.named_weights(), [engine], version)
            expected = score(policy, ids)
            assert verify(engine, ids, expected, "float32") < 1e-5
        (child,) = [p for p in psutil.Process().children() if "sapo_rl.engines.vllm.child" in p.cmdline()]
        child.kill()
        assert verify(engine, ids, expected, "float32") < 1e-5
        assert engine.restarts == 1
    finally:
        engine.close()
        transport.close()


@torch.no_grad()
def score(policy: LoraPolicy, ids: list[int]) -> list[float]:
    (batch,) = pack([[make_item(ids[:1], ids[1:])]], len(ids))
    return policy(batch, 1.0)[0].tolist()
