"""Estimates of the memory that a run takes, from its config and the shape of its model; and what a CPU computes in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sapo_rl.config import ADAMW_8BIT, Config
from sapo_rl.config.model import vllm_rank

GIB = 2**30
_GATHERED = 1 / 8
"""Share of a GPU's memory that `gathered_bytes` may take, for FSDP2 to keep them."""
NO_BFLOAT16 = "this CPU has no instructions for bfloat16: model.dtype=float32 is several times faster here"


def element_size(config: Config) -> int:
    """Return the bytes of one number in the precision that the model computes in."""
    return 2 if config.model.dtype == "bfloat16" else 4


def trainer_memory(config: Config, count: int, shape: dict[str, Any], adapters: int) -> dict[str, float]:
    """Estimate the bytes that the trainer takes, by use.

    `count` is the number of parameters, `shape` the model's Hugging Face config, `adapters` as `adapter_parameters`.
    """
    width, layers = shape.get("hidden_size", 0), shape.get("num_hidden_layers", 0)
    size = element_size(config)
    tokens = config.trainer.tokens_per_micro_batch
    per_token = 2 * width if config.trainer.gradient_checkpointing else 34 * width
    lora = config.model.lora.rank
    trained = adapters if lora else count
    each = 10 if config.trainer.optimizer == ADAMW_8BIT else 16
    return {
        "frozen weights": size * count if lora else 0,
        f"float32 weights, gradients, AdamW ({trained / 1e6:.3g}M parameters)": each * trained,
        "copy of the weights to compute with": 0 if lora or size == 4 else size * count,
        f"activations ({tokens} tokens a micro-batch)": tokens * layers * per_token * size / 2,
        "logits (1024 tokens at a time, float32)": 3 * 4 * 1024 * shape.get("vocab_size", 0),
        "reference model": size * count if config.loss.kl.coef and not lora else 0,
    }


def gathered_bytes(weights: int, trained: int, size: int) -> int:
    """Return what FSDP2 keeps of a small model in an update: weights of `size` bytes, and float32 gradients."""
    return size * weights + 4 * trained


def is_kept(weights: int, size: int, gpu: int) -> bool:
    """Return whether FSDP2 keeps a model of so many weights of `size` bytes, by the memory of a GPU in bytes."""
    return gathered_bytes(weights, weights, size) <= _GATHERED * gpu


def fsdp_memory(taken: Mapping[str, float], ranks: int, gathered: float) -> dict[str, float]:
    """Return by use what one of the ranks takes under FSDP2, where one that shards nothing takes `taken`.

    `gathered` is as `gathered_bytes` where the model is kept; else layers are gathered one at a time.
    """
    spread = ("frozen weights", "float32 weights", "reference model")
    own = {use: value / ranks if use.startswith(spread) else value for use, value in taken.items()}
    own["copy of the weights to compute with"] = 0.0
    return own | {"gathered weights and whole gradients": gathered}


def adapter_parameters(config: Config, linear: Mapping[str, int]) -> int:
    """Return the parameters of the adapters: `rank` x (inputs + outputs) of each module that gets one.

    `linear` has these sums by the last part of the modules' names.
    """
    names = config.model.lora.target_modules
    chosen = sum(size for name, size in linear.items() if "all-linear" in names or name in names)
    return config.model.lora.rank * chosen


def engine_parameters(config: Config, count: int, adapters: int) -> int:
    """Return the parameters that vLLM keeps: the model's, and the room that it makes for adapters that come alone."""
    rank = config.model.lora.rank
    return count + (adapters // rank * vllm_rank(rank) if config.model.lora.alone else 0)


def sent_parameters(config: Config, count: int, adapters: int) -> int:
    """Return the parameters that go to vLLM after a step, or an upper bound of them."""
    return adapters if config.model.lora.alone else count


def buffer_bytes(config: Config, count: int) -> int:
    """Return the GPU memory that the way of `count` parameters to vLLM takes, as far as the config tells."""
    if config.rollout.servers or config.rollout.transport == "file" or config.rollout.tensor_parallel > 1:
        return 0
    whole = count * element_size(config)
    return min(whole, int(config.rollout.sync_buffer_gb * GIB) or whole)


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU computes in bfloat16; also where the system does not tell."""
    words = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.is_file() else set()
    return not words or bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
