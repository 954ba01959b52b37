"""What `test_ranks.py` has several ranks do: every way of sharding in turn, in one launch.

`torchrun rank_cases.py RANKS FOLDER SOURCE`: rank 0 writes what came out into FOLDER/RANKS.json. What SOURCE ranks did
is resumed: they must come first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_model
from samples import as_group
from tiny import small_llama

from sapo_rl.config import Config, LoraConfig, ModelConfig, RolloutConfig, TrainerConfig
from sapo_rl.config.loss import LossConfig
from sapo_rl.policy import checkpoint, parallel
from sapo_rl.policy.lora import LoraPolicy
from sapo_rl.policy.model import DTYPES, Policy, load_policy
from sapo_rl.policy.parallel import loads_weights
from sapo_rl.policy.trainer import PolicyTrainer
from sapo_rl.run_folder import latest_checkpoint
from sapo_rl.types import Group, Prompt, TokenValues

VOCABULARY = 41
ENVIRONMENTS = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "fsdp2, layers kept": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
    },
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
WAYS = [way for way in ENVIRONMENTS if importlib.util.find_spec("deepspeed") or not way.startswith("zero")]


def make_policy(dtype: torch.dtype = torch.float32, seed: int = 0) -> Policy:
    """A tied head in float32, one of its own in bfloat16; few sizes divide by four ranks."""
    tied = dtype == torch.float32
    shape = {"hidden_size": 40, "intermediate_size": 46, "num_attention_heads": 1, "tie_word_embeddings": tied}
    model = small_llama(VOCABULARY, seed, **shape)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms are ones at first, which all dtypes hold exactly
            parameter.data += 0.3 * torch.rand_like(parameter)
    return Policy(model, dtype)


def load(accelerator: Accelerator, config: ModelConfig, seed: int = 0, recompute: bool = False) -> Policy:
    """The policy of `make_policy` as a run loads it, on some ranks without its weights."""
    described = dataclasses.replace(config, path=saved(config.dtype, seed).name)
    return load_policy(described, recompute, empty=not loads_weights(accelerator))


@functools.cache
def saved(dtype: str, seed: int) -> tempfile.TemporaryDirectory[str]:
    """The model of `make_policy` as a folder, which is deleted at the end of the process."""
    folder = tempfile.TemporaryDirectory()
    model = make_policy(DTYPES[dtype], seed).model
    model.config.save_pretrained(folder.name)
    save_model(model, f"{folder.name}/model.safetensors", {"format": "pt"})  # save_pretrained writes on rank 0 alone
    return folder


def make_groups(seed: int) -> list[Group]:
    """Eight groups of four; five have nothing to teach, so that of four ranks one is left without work."""
    rng = random.Random(seed)
    groups = []
    for index in range(8):
        prompt = Prompt(index, [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 6))], "", {})
        replies = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 7))] for _ in range(4)]
        groups.append(as_group(prompt, replies, [0.0 if index < 5 else rng.gauss(0, 1) for _ in replies]))
    return groups


def launch(ranks: int, folder: Path, source: int) -> dict[str, Any]:
    """Start the ranks; return what each way of sharding did."""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    arguments = (str(ranks), str(folder), str(source))
    if not torch.cuda.is_available():
        forked.ranks("policy.rank_cases", ranks, *arguments, DS_ACCELERATOR="cpu", **quiet)
        return json.loads((folder / f"{ranks}.json").read_text())
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = os.environ | quiet | {"PYTHONPATH": path}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*torchrun, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / f"{ranks}.json").read_text())


@contextlib.contextmanager
def launched(way: str) -> Iterator[None]:
    """Set what `accelerate launch` would for a way of sharding."""
    os.environ.update(ENVIRONMENTS[way])
    yield
    for name in ENVIRONMENTS[way]:
        del os.environ[name]


def make_trainer(accelerator: Accelerator, way: str, kind: str = "whole") -> PolicyTrainer:
    """In float32, the whole or adapters alone (`lora`), or in bfloat16 with recomputation and a reference (`half`).

    `often` takes four updates on the same samples, so that ratios are not 1, and so does `m2po`, whose loss has a mask
    over the batch of all ranks; with `auto` the temperatures set themselves.
    """
    settings = TrainerConfig(steps=4, learning_rate=1e-2, schedule="cosine", max_grad_norm=0.1)
    settings.adam_eps = 1e-5  # a gradient of nearly zero is the noise of its rounding
    settings.tokens_per_micro_batch, settings.updates_per_rollout = 20, 1
    if kind in ("often", "m2po", "auto"):
        settings.updates_per_rollout, settings.mini_batches = 4, 1
    rollout = RolloutConfig(batch_size=32, group_size=4, max_completion_tokens=7)
    with launched(way):
        config = Config(model=ModelConfig(path="none"), rollout=rollout, trainer=settings)
        config.logging.tokens = kind == "often"
        if kind == "m2po":
            config.loss = LossConfig(name="m2po", m2_threshold=1e-3)
        if kind == "auto":
            config.loss.tau_target_kl = 1e-4
        single, half = ModelConfig(dtype="float32"), ModelConfig(dtype="bfloat16")
        if kind == "lora":
            adapters = LoraConfig(rank=3)
            base = load(accelerator, dataclasses.replace(single, lora=adapters))
            return PolicyTrainer(LoraPolicy(base, adapters, seed=0, base="none"), None, config, accelerator)
        if kind != "half":
            return PolicyTrainer(load(accelerator, single), None, config, accelerator)
        config.loss.kl.coef = 0.1
        policy, reference = load(accelerator, half, recompute=True), load(accelerator, half, seed=1)
        return PolicyTrainer(policy, reference, config, accelerator)


def train(trainer: PolicyTrainer, seed: int) -> dict[str, float]:
    """One update on this rank's share of the groups."""
    accelerator, groups = trainer.accelerator, make_groups(seed)
    size = len(groups) // accelerator.num_processes
    own = groups[accelerator.process_index * size : (accelerator.process_index + 1) * size]
    metrics = trainer.train_on(own, contextlib.nullcontext)
    trainer.score([1, 2, 3])  # leaves gathered what a backward pass would have put back
    return metrics


def told(accelerator: Accelerator, one: TokenValues) -> dict[str, Any]:
    """What an update has made of a sample's tokens, by the place of its group among those of all ranks."""
    group = one.place.rank * (8 // accelerator.num_processes) + one.place.group
    return {"place": [group, one.place.sample], "ids": one.rows[0].token_ids, "ratio": one.columns["ratio"].tolist()}


def weights_of(trainer: PolicyTrainer) -> dict[str, list[float]]:
    return {name: weight.flatten().tolist() for name, weight in trainer.policy.named_weights()}


def run(accelerator: Accelerator, way: str, folder: Path) -> dict[str, Any]:
    """Two updates, a checkpoint and an export into `folder`, two more; and a first one of other kinds."""
    trainer = make_trainer(accelerator, way)
    found: dict[str, Any] = {"fresh": weights_of(trainer), "updates": [train(trainer, 0), train(trainer, 1)]}
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder, 2, trainer, {"by": way}, keep_last=1)
    trainer.policy.export(folder / "final", accelerator.is_main_process)
    found["weights"] = weights_of(trainer)
    found["updates"] += [train(trainer, 2), train(trainer, 3)]
    often = make_trainer(accelerator, way, "often")
    found["often"] = train(often, 0)
    found["tokens"] = gather_object([told(accelerator, one) for one in often.tokens])
    found["m2po"] = train(make_trainer(accelerator, way, "m2po"), 0)
    auto = make_trainer(accelerator, way, "auto")
    found["auto"] = [train(auto, 0), train(auto, 1)]
    found["scales"] = gather_object([auto.temperatures.scale])
    found["half"] = train(make_trainer(accelerator, way, "half"), 0)
    adapted = make_trainer(accelerator, way, "lora")
    found["lora"] = train(adapted, 0)
    found["lora_weights"] = weights_of(adapted)
    return found


def resume(accelerator: Accelerator, way: str, folder: Path) -> list[dict[str, float]]:
    """The third and the fourth update, from a checkpoint after the second."""
    trainer = make_trainer(accelerator, way)
    step, _ = checkpoint.load(latest_checkpoint(folder), trainer)
    assert (step, trainer.updates) == (2, 2)
    return [train(trainer, 2), train(trainer, 3)]


def main(ranks: int, folder: Path, source: int) -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    assert accelerator.num_processes == ranks
    # As where one GPU has room for the layers and another has not: all ranks must do the same.
    setattr(parallel, "_is_small", lambda policy, device: accelerator.is_main_process)  # noqa: B010
    found = {way: run(accelerator, way, folder / str(ranks) / way) for way in WAYS}
    for way in WAYS:
        found[way]["resumed"] = resume(accelerator, way, folder / str(source) / way)
        if way != "fsdp2":
            found[way]["resumed_by_fsdp2"] = resume(accelerator, "fsdp2", folder / str(source) / way)
    if accelerator.is_main_process:
        (folder / f"{ranks}.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    time.sleep(0.2)  # gloo's destructor may otherwise hang
    accelerator.end_training()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
