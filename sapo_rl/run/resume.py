"""Going on with a run: from which step, and what may differ from the run so far. Imports no torch."""

from __future__ import annotations

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
    "data.source",
    "data.path",
    "data.subset",
    "data.split",
    "data.size",
    "data.args",
    "data.shuffle",
    "data.split_seed",
    "rollout.group_size",
    "seed",
)
"""Keys without whose values the weights, or the place in the order of prompts, mean nothing."""
HELD_OUT = ("data.eval_path", "data.eval_split", "eval.prompts")
"""The same, where the held-out rows are taken out of the training rows."""
MOVABLE = ("model.path", "data.path")
"""Keys that may name another place once nothing is left in the old one."""
NOT_OF_THE_RUN = ("description", "dry_run", "check", "resume")
_ABSENT = object()


class Plan(NamedTuple):
    """What a resume would do."""

    checkpoint: Path
    step: int
    """The last one done."""
    updates: int
    """So many are done."""
    changes: dict[str, str]
    """`before -> now` by key."""


def plan(config: Config, frozen: str) -> Plan:
    """Look at the newest checkpoint of the run that `config` (as YAML: `frozen`) goes on with.

    Raises:
        ConfigError: a key differs from the run so far that cannot, or `run_dir` is set; it is named.
        UserError: there is no checkpoint, it is damaged, no step is left to do, or the run has just begun.
    """
    if config.run_dir:
        raise ConfigError("run_dir", "a run that is resumed stays in its folder; leave run_dir out")
    folder = expand(str(config.resume))
    run_folder.refuse_finished(folder, config.trainer.steps)
    if not run_folder.checkpoints_in(folder / run_folder.CHECKPOINTS):
        run_folder.refuse_going_on(folder)  # a run that has just begun has none either
    checkpoint = run_folder.latest_checkpoint(folder / run_folder.CHECKPOINTS)
    record = manifest.read_record(checkpoint)
    before = record["state"]["config"]
    _refuse_changes(yaml.safe_load(before), yaml.safe_load(frozen))
    return Plan(checkpoint, record["step"], record["updates"], changes(before, frozen))


def changes(before: str, now: str) -> dict[str, str]:
    """Return `before -> now` of the keys in which two configs (YAML) differ; secrets are neither shown nor compared."""
    old, new = (dict(leaves(yaml.safe_load(run_folder.redact_yaml(text)), empty=True)) for text in (before, now))
    differing = [key for key in old | new if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
    return {key: f"{_shown(old, key)} -> {_shown(new, key)}" for key in differing if key not in NOT_OF_THE_RUN}


def _refuse_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    held_out_of_training = not all(
        _value(config, "data.eval_path") or _value(config, "data.eval_split") for config in (before, now)
    )
    for key in FIXED + HELD_OUT * held_out_of_training:
        old, new = _value(before, key), _value(now, key)
        if old is _ABSENT or old == new or (key in MOVABLE and _is_gone(old)):
            continue
        raise ConfigError(
            key, f"is {new}, but the run was begun with {old}, and a resume cannot change it; start a new run for that"
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
