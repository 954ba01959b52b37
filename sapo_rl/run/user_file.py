"""A user's recipe: a file of keys and values, whose shape is looked over before Hydra sees it. It can run no code."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sapo_rl.config import Config, EnvironmentConfig, RewardFunctionConfig
from sapo_rl.config.evaluation import EvalSetConfig
from sapo_rl.config.loss import LossConfig
from sapo_rl.config.nested import leaves
from sapo_rl.errors import UserError, first_line
from sapo_rl.errors.files import is_file, read_yaml
from sapo_rl.run import eval_sets
from sapo_rl.run.checks import ConfigError

DEFAULTS = "[quickstart, {override /loss: grpo}, _self_]"
"""An example for messages."""
HYDRA_GROUPS = ("hydra/launcher", "hydra/sweeper")
"""Groups of Hydra's that a recipe may choose from: how a sweep is run. Others can name any function to be called."""
HYDRA_KEYS = {
    "hydra.mode",
    "hydra.sweeper.params",
    "hydra.sweeper.direction",
    "hydra.sweeper.n_jobs",
    "hydra.sweeper.n_trials",
    "hydra.launcher.n_jobs",
}
"""Hydra's keys that a recipe may set."""

ENTRIES: dict[str, tuple[type, str, str]] = {
    "functions": (RewardFunctionConfig, "{{function: {}}}", "numeric_answer"),
    "environments": (EnvironmentConfig, "{{name: {}}}", "guess"),
    "sets": (EvalSetConfig, "{{data: {{path: {}}}}}", "prompts.jsonl"),
}
"""What may stand under names of the user's own: its schema, how the key is written that it cannot do without, and an
example of that."""
LONGEST_NUMBER = 1000
"""Bits of a whole number; longer ones do not fit into a float."""


def load(path: Path, configs: Path) -> DictConfig:
    """Return what the recipe in `path` holds; `configs` is the folder of the shipped groups.

    Raises:
        UserError: naming the file, and the key or line: it cannot be read, is no mapping, has a defaults list that
            cannot be, other values than a section's keys where a section stands, or keys by which Hydra runs code.
    """
    try:
        node = read_yaml(path, _load)
    except OmegaConfBaseException as error:  # such as a reference without its end
        raise UserError(f"{error.full_key or 'config'} ({path}): {first_line(error)}") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"config: {path} must hold a mapping of keys to values")
    eval_sets.from_file(node)
    content: Any = OmegaConf.to_container(node)
    _check_defaults(content.get("defaults"), path, configs)
    _check_hydra(content.get("hydra", {}), path)
    try:
        check_shape(content, configs)
    except ConfigError as error:
        raise UserError(f"{error.key} ({path}): {error.problem}") from error
    return node


def _load(stream: io.StringIO) -> DictConfig | ListConfig | None:
    try:
        events = yaml.parse(stream, yaml.SafeLoader)
        root = next((event for event in events if isinstance(event, yaml.NodeEvent)), None)
        if isinstance(root, yaml.ScalarEvent) and root.value:  # a text, of which OmegaConf makes a key
            return None
        stream.seek(0)
        return OmegaConf.load(stream)
    except OSError:  # what it makes of a single value
        return None


def check_shape(content: dict[Any, Any], configs: Path) -> None:
    """Refuse values that cannot be merged into a `Config` by their shape alone; single ones are looked at later.

    Raises:
        ConfigError: naming the key.
    """
    _check_section(content, Config, "", configs)


def _check_defaults(defaults: Any, path: Path, configs: Path) -> None:
    where = f"config: {path}: in `defaults`"
    if defaults is None:
        return
    if not isinstance(defaults, list):
        raise UserError(f"config: {path}: `defaults` is {_shown(defaults)}, must be a list such as {DEFAULTS}")
    for entry in defaults:
        name, choice = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, "")
        words = name.split() if isinstance(name, str) else []
        choices = choice if isinstance(choice, list) else [choice]
        if not words or not words[-1].strip("/") or not all(isinstance(one, str | None) for one in choices):
            raise UserError(f"{where}, {_shown(entry)} is neither a recipe's name nor one group; e.g. {DEFAULTS}")
        group, _, package = words[-1].strip("/").partition("@")
        if group == "config" and isinstance(entry, dict):
            raise UserError(f"{where}, name a recipe alone: [quickstart, _self_], not {_shown(entry)}")
        if "hydra" in package or (group.partition("/")[0] == "hydra" and group not in HYDRA_GROUPS):
            raise UserError(
                f"{where}, {_shown(entry)} could run code, which a recipe may not; valid: {', '.join(HYDRA_GROUPS)}"
            )
        if entry == path.stem and not is_file(configs / "config" / f"{entry}.yaml"):
            raise UserError(f"{where}, '{entry}' is this file itself; name another recipe")


def _check_hydra(section: Any, path: Path) -> None:
    for key, value in leaves({"hydra": section}):
        inside = key.partition("hydra.sweeper.params.")[2]
        if "hydra" in inside or not any(f"{key}.".startswith(f"{allowed}.") for allowed in HYDRA_KEYS):
            raise UserError(
                f"{key} ({path}): is {_shown(value)}; Hydra's keys can run code, which a recipe may not; valid: "
                f"{', '.join(sorted(HYDRA_KEYS))}; on the command line all are"
            )


def _check_section(content: dict[Any, Any], schema: type, prefix: str, configs: Path) -> None:
    hints = get_type_hints(schema)
    for name, value in content.items():
        hint, key = hints.get(name), f"{prefix}{name}"
        if hint is None or (isinstance(value, str) and value.startswith("${")):
            continue  # a key that does not exist is told with its nearest name
        if dataclasses.is_dataclass(hint) or get_origin(hint) is dict:
            if not isinstance(value, dict):
                raise ConfigError(key, _no_mapping(key, value, configs))
            children = get_args(hint)[1:]
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                _check_section(value, hint, f"{key}.", configs)
            elif children and dataclasses.is_dataclass(children[0]):
                _check_entries(value, name, f"{key}.", configs)
        elif get_origin(hint) is list and not isinstance(value, list):
            raise ConfigError(key, f"is {_shown(value)}, must be a list such as [{value}]")
        elif get_origin(hint) is not list and isinstance(value, list | dict):
            raise ConfigError(key, f"is {_shown(value)}, must be one value")
        elif isinstance(value, int) and value.bit_length() > LONGEST_NUMBER:
            raise ConfigError(key, "is a whole number of more than 300 digits")


def _check_entries(content: dict[Any, Any], section: str, prefix: str, configs: Path) -> None:
    """Look over reward functions, environments or sets of evaluations under names of the user's own."""
    schema, form, example = ENTRIES[section]
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, str) and not value.startswith("${"):
            raise ConfigError(key, f"is '{value}'; write {name}: {form.format(value)}")
        if not isinstance(value, dict):
            raise ConfigError(key, f"is {_shown(value)}, must be such as {form.format(example)}")
        _check_section(value, schema, f"{key}.", configs)


def _no_mapping(key: str, value: Any, configs: Path) -> str:
    """What stands in a section's place, and where it belongs."""
    if value is None:
        return "is empty; leave it out, or put keys under it"
    if isinstance(value, str) and key == "loss" and not is_file(configs / key / f"{value}.yaml"):
        names = ", ".join(LossConfig.__dataclass_fields__["name"].metadata["choices"])
        return f"is '{value}'; write loss: {{name: {value}}}; valid: {names}, or your own package.module.Name"
    if isinstance(value, str) and key == "model" and not is_file(configs / key / f"{value}.yaml"):
        return f"is '{value}'; write model: {{path: {value}}}"
    if isinstance(value, str) and "." not in key and (configs / key).is_dir():
        choice = f"a choice goes into `defaults: [{{override /{key}: {value}}}, _self_]`"
        return f"is '{value}'; {choice}, keys under `{key}:`"
    return f"is {_shown(value)}, must be a mapping of keys to values"


def _shown(value: Any) -> str:
    return repr(value) if value is not None else "null"
