"""`dry_run=true`: what a run would do, and what would end it, without loading the model or starting vLLM."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from sapo_rl.config import Config
from sapo_rl.policy import model_folder
from sapo_rl.run import packaged, rehearsal
from sapo_rl.run.resume import Plan
from sapo_rl.sizing import (
    GIB,
    adapter_parameters,
    buffer_bytes,
    element_size,
    engine_parameters,
    sent_parameters,
    trainer_memory,
)


def preview(config: Config, frozen: str, resumed: Plan | None = None) -> None:
    """Print the resolved config (`frozen`, YAML) as a tree, the batch arithmetic, the data, and the memory estimated.

    Of a run that is resumed, also from where it would go on, and what has changed since. Warnings go to stderr. Raises
    UserError for what a run would refuse in its data and reward functions.
    """
    console = Console()
    tree = Tree("config")
    _grow(tree, yaml.safe_load(frozen) | {"run_dir": config.run_dir})
    console.print(tree)
    console.print(_table("batch", batch_arithmetic(config)))
    trial = rehearsal.rehearse(config)
    console.print(_table("data", trial.data))
    count = 0 if (plan := packaged.plan_of(config.model.path)) else _parameters(config)
    rows = memory_rows(config, count) if count else {}
    rows |= rehearsal.cpu_cache(config) if rows else {}
    told = {name: f"{value / GIB:.2f}" for name, value in rows.items()} | {"sum": f"{sum(rows.values()) / GIB:.2f}"}
    unknown = {"weights and optimiser": f"? (the weights are {'not there yet' if plan else 'no local safetensors'})"}
    console.print(_table("memory (GiB, a process that shards nothing)", told if rows else unknown))
    if plan:
        console.print(_table("made at the start of the run", {"model": plan}))
    for warning in [*trial.warnings, rehearsal.memory_warning(config, rows, count)]:
        if warning is not None:
            print(f"sapo-train: warning: {warning}", file=sys.stderr)
    if resumed:
        console.print(_table("fork" if config.fork else "resume", going_on(config, resumed)))


def preview_evaluation(config: Config, frozen: str, models: Sequence[str]) -> None:
    """Print the resolved config, the models that would be measured, and on what; warnings go to stderr.

    Raises:
        UserError: for what an evaluation would refuse in its data and reward functions.
    """
    console = Console()
    tree = Tree("config")
    _grow(tree, yaml.safe_load(frozen) | {"run_dir": config.run_dir})
    console.print(tree)
    console.print(_table("models", {str(number): path for number, path in enumerate(models, start=1)}))
    trial = rehearsal.rehearse_evaluation(config)
    console.print(_table("sets", trial.data))
    for warning in trial.warnings:
        print(f"sapo-eval: warning: {warning}", file=sys.stderr)


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
        "longest sequence": f"{config.max_sequence_tokens} tokens",
    }


def going_on(config: Config, resumed: Plan) -> dict[str, str]:
    """Return from where a run would go on, how much is left, and which keys have changed since."""
    left = config.trainer.steps - resumed.step
    return {
        "from": f"step {resumed.step}, update {resumed.updates}: {resumed.checkpoint}",
        "left": f"{left} of {config.trainer.steps} steps, {left * config.trainer.updates_per_rollout} updates",
    } | (resumed.changes or {"changes": "none"})


def memory_rows(config: Config, count: int) -> dict[str, float]:
    """Return the bytes that weights, optimiser, activations and logits of a local model of `count` parameters take."""
    folder = Path(config.model.path).expanduser()
    shape = model_folder.text_part(model_folder.read_json(folder / model_folder.CONFIG))
    adapters = _adapters(config)
    kept = engine_parameters(config, count, adapters) * element_size(config)
    buffer = buffer_bytes(config, sent_parameters(config, count, adapters))
    trainer = trainer_memory(config, count, shape, adapters)
    return trainer | {"vLLM's weights": kept, "weights on their way to vLLM": buffer}


def _parameters(config: Config) -> int:
    """How many the model has; 0 where that is not known."""
    folder = model_folder.local_folder(config.model.path)
    return (model_folder.count_parameters(folder) if folder else None) or 0


def _adapters(config: Config) -> int:
    if not config.model.lora.rank:
        return 0
    from sapo_rl.engines.build import model_facts  # imports torch

    return adapter_parameters(config, model_facts(config.model).linear)


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for _ in range(2):
        table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    return table
