"""`dry_run=true`: what a run would do, without torch and without starting anything."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from sapo_rl.config import Config

GIB = 2**30


def preview(config: Config, frozen: str) -> None:
    """Print the resolved config (`frozen`, YAML) as a tree, the batch arithmetic and an estimate of the memory."""
    console = Console()
    tree = Tree("config")
    _grow(tree, yaml.safe_load(frozen))
    console.print(tree)
    console.print(_table("batch", batch_arithmetic(config)))
    console.print(_table("memory (GiB, a process that shards nothing)", memory_estimate(config)))


def _grow(tree: Tree, node: dict[str, Any]) -> None:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            _grow(tree.add(f"[bold]{escape(key)}"), value)
        else:
            tree.add(f"{escape(key)}: {escape(str(value))}")


def batch_arithmetic(config: Config) -> dict[str, str]:
    """Return the counts that follow from the config, in words and numbers."""
    rollout, trainer = config.rollout, config.trainer
    prompts = rollout.batch_size // rollout.group_size
    parts = trainer.mini_batches or trainer.updates_per_rollout
    return {
        "completions a step": f"{rollout.batch_size} = {prompts} prompts x {rollout.group_size}",
        "updates a step": f"{trainer.updates_per_rollout}, on {rollout.batch_size // parts} completions each",
        "passes over each completion": str(trainer.updates_per_rollout // parts),
        "processes": f"{config.launch.num_processes}, with {prompts // config.launch.num_processes} prompts each",
        "completions in all": str(rollout.batch_size * trainer.steps),
        "updates in all": str(trainer.updates_per_rollout * trainer.steps),
        "longest sequence": f"{config.data.max_prompt_tokens + rollout.max_completion_tokens} tokens",
    }


def memory_estimate(config: Config) -> dict[str, str]:
    """Return the memory that weights, optimiser, activations and logits take; `?` where the model is not local."""
    folder = Path(config.model.path).expanduser()
    count = count_parameters(folder)
    if count is None:
        return {"weights and optimiser": "? (the model is not on this machine)"}
    shape = json.loads((folder / "config.json").read_text())
    rows = trainer_memory(config, count, shape) | {"vLLM's weights": count * element_size(config)}
    rows |= {"weights on their way to vLLM": buffer_bytes(config, count)}
    return {name: f"{value / GIB:.2f}" for name, value in rows.items()} | {"sum": f"{sum(rows.values()) / GIB:.2f}"}


def element_size(config: Config) -> int:
    """Return the bytes of one number in the precision that the model computes in."""
    return 2 if config.model.dtype == "bfloat16" else 4


def buffer_bytes(config: Config, count: int) -> int:
    """Return the GPU memory that the way of `count` parameters to vLLM takes, as far as the config tells."""
    if config.rollout.servers or config.rollout.transport == "file" or config.rollout.tensor_parallel > 1:
        return 0
    return min(count * element_size(config), int(config.rollout.sync_buffer_gb * GIB))


def trainer_memory(config: Config, count: int, shape: dict[str, Any]) -> dict[str, float]:
    """Estimate the bytes that the trainer takes, by use.

    `count` is the number of parameters, `shape` the model's Hugging Face config.
    """
    width, layers = shape.get("hidden_size", 0), shape.get("num_hidden_layers", 0)
    size = element_size(config)
    tokens = config.trainer.tokens_per_micro_batch
    per_token = 2 * width if config.trainer.gradient_checkpointing else 34 * width
    lora = config.model.lora.rank
    trained = adapter_parameters(config, shape) if lora else count
    return {
        "frozen weights": size * count if lora else 0,
        f"float32 weights, gradients, AdamW ({trained / 1e6:.3g}M parameters)": 16 * trained,
        "copy of the weights to compute with": 0 if lora or size == 4 else size * count,
        f"activations ({tokens} tokens a micro-batch)": tokens * layers * per_token * size / 2,
        "logits (1024 tokens at a time, float32)": 3 * 4 * 1024 * shape.get("vocab_size", 0),
        "reference model": size * count if config.loss.kl.coef and not lora else 0,
    }


def adapter_parameters(config: Config, shape: dict[str, Any]) -> int:
    """Return the parameters of the adapters: `rank` x (inputs + outputs) each, of modules as in Llama's layers."""
    width, inner = shape.get("hidden_size", 0), shape.get("intermediate_size", 0)
    heads = shape.get("num_attention_heads", 1)
    head_size = shape.get("head_dim") or width // heads
    queries, keys = heads * head_size, (shape.get("num_key_value_heads") or heads) * head_size
    sizes = {"q_proj": width + queries, "k_proj": width + keys, "v_proj": width + keys, "o_proj": queries + width}
    sizes |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), width + inner)
    names = config.model.lora.target_modules
    chosen = sum(size for name, size in sizes.items() if "all-linear" in names or name in names)
    return config.model.lora.rank * chosen * shape.get("num_hidden_layers", 0)


def count_parameters(folder: Path) -> int | None:
    """Count the elements of a model folder's safetensors from their headers; None where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    total = 0
    for file in files:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                elements = 1
                for dimension in entry["shape"]:
                    elements *= dimension
                total += elements
    return total if files else None


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    return table
