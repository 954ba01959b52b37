"""Going on with a run, or from it: at which step, and what may differ from the run so far. Imports no torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sapo_rl import run_folder
from sapo_rl.config import Config
from sapo_rl.config.nested import leaves
from sapo_rl.errors.files import expand
from sapo_rl.policy import manifest, model_folder
from sapo_rl.run.checks import ConfigError

FIXED = (
    "model.path",
    "model.revision",
    "model.lora.rank",
    "model.lora.alpha",
    "model.lora.target_modules",
    "trainer.optimizer",
    "data.source",
    "data.path",
    "data.subset",
    "data.split",
    "data.size",
    "data.args",
    "data.shuffle",
    "data.sampling",
    "data.split_seed",
    "rollout.group_size",
    "seed",
)
"""Keys without whose values the weights, or the place in the order of prompts, mean nothing."""
HELD_OUT = ("data.eval_path", "data.eval_split", "eval.prompts")
"""The same, where the held-out rows are taken out of the training rows."""
MOVABLE = ("model.path", "data.path")
"""Keys that may name another place once nothing is left in the old one."""
NOT_OF_THE_RUN = ("description", "dry_run", "check", "resume", "fork", "step")
_ABSENT = object()


class Plan(NamedTuple):
    """What a resume or fork would do."""

    checkpoint: Path
    step: int
    """The last one done."""
    updates: int
    """So many are done."""
    changes: dict[str, str]
    """`before -> now` by key."""


def plan(config: Config, frozen: str) -> Plan:
    """Look at the checkpoint that `config` (as YAML: `frozen`) goes on from: a resume's the newest, a fork's any.

    Raises:
        ConfigError: a key differs from the run so far that cannot, or does not go with the others; it is named.
        UserError: there is no such checkpoint, it is damaged, no step is left to do, or the run has just begun.
    """
    if config.resume and config.run_dir:
        raise ConfigError("run_dir", "a run that is resumed stays in its folder; leave run_dir out")
    checkpoint = _forked(config) if config.fork else _newest(config)
    kept = manifest.read_record(checkpoint)
    before = kept["state"]["config"]
    _refuse_changes(yaml.safe_load(before), yaml.safe_load(frozen), "fork" if config.fork else "resume")
    return Plan(checkpoint, kept["step"], kept["updates"], changes(before, frozen))


def _newest(config: Config) -> Path:
    folder = expand(str(config.resume))
    run_folder.refuse_finished(folder, config.trainer.steps)
    if not run_folder.checkpoints_in(folder / run_folder.CHECKPOINTS):
        run_folder.refuse_going_on(folder)  # a run that has just begun has none either
    return run_folder.latest_checkpoint(folder / run_folder.CHECKPOINTS)


def _forked(config: Config) -> Path:
    folder = expand(str(config.fork))
    saved = {run_folder.step_of(path): path for path in run_folder.checkpoints_in(folder / run_folder.CHECKPOINTS)}
    if not saved:
        raise ConfigError("fork", f"'{folder}' has no checkpoint; checkpoint.every sets when a run makes them")
    step = max(saved) if config.step is None else config.step
    if step not in saved:
        kept = ", ".join(map(str, saved))
        raise ConfigError("step", f"'{folder}' has no checkpoint of step {step}; valid: {kept}")
    if step >= config.trainer.steps:
        steps = f"is {config.trainer.steps}, and the run to fork from has made {step} steps at that checkpoint"
        raise ConfigError("trainer.steps", f"{steps}; raise it, or set step to an earlier one")
    return saved[step]


def begin_fork(checkpoint: Path, folder: Path) -> None:
    """Give a new run folder what the forked run had at a checkpoint: its files are linked, not copied, where they can.

    Numbers and completions up to its step come along, so that the new run is whole by itself.

    Raises:
        OSError: something cannot be read or written.
    """
    source, step = checkpoint.parents[1], run_folder.step_of(checkpoint)
    shutil.copytree(checkpoint, folder / run_folder.CHECKPOINTS / checkpoint.name, copy_function=_link)
    if (source / run_folder.METRICS).is_file():
        shutil.copy(source / run_folder.METRICS, folder)  # later records are dropped as by any resume
    for path in source.glob(f"{run_folder.COMPLETIONS}/*_*.parquet"):
        if int(path.stem.rpartition("_")[2]) <= step:
            (folder / run_folder.COMPLETIONS).mkdir(exist_ok=True)
            _link(path, folder / run_folder.COMPLETIONS / path.name)


def _link(source: str | Path, target: str | Path) -> None:
    """Link a file that is never written to again; copy it to another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def changes(before: str, now: str) -> dict[str, str]:
    """Return `before -> now` of the keys in which two configs (YAML) differ; secrets are neither shown nor compared."""
    old, new = (dict(leaves(yaml.safe_load(run_folder.redact_yaml(text)), empty=True)) for text in (before, now))
    differing = [key for key in old | new if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
    return {key: f"{_shown(old, key)} -> {_shown(new, key)}" for key in differing if key not in NOT_OF_THE_RUN}


def _refuse_changes(before: dict[str, Any], now: dict[str, Any], way: str) -> None:
    held_out_of_training = not all(
        _value(config, "data.eval_path") or _value(config, "data.eval_split") for config in (before, now)
    )
    for key in FIXED + HELD_OUT * held_out_of_training:
        old, new = _value(before, key), _value(now, key)
        if old is _ABSENT or old == new or (key in MOVABLE and _is_gone(old)):
            continue
        raise ConfigError(
            key, f"is {new}, but the run was begun with {old}, and a {way} cannot change it; start a new run for that"
        )


def _is_gone(path: Any) -> bool:
    """Whether nothing is left where a path led to; a name on the hub is none."""
    return isinstance(path, str) and model_folder.looks_local(path) and not expand(path).exists()


def _value(config: dict[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part, _ABSENT) if isinstance(node, dict) else _ABSENT
    return node


def _shown(config: dict[str, Any], key: str) -> str:
    return str(config[key]) if key in config else "nothing"
