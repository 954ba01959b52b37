"""`eval.sets` as a user writes it: names of shipped sets, and keys that differ from theirs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from sapo_rl.config.schema import schema
from sapo_rl.errors import did_you_mean
from sapo_rl.paths import CONFIGS
from sapo_rl.run.config_error import ConfigError

FOLDER = CONFIGS / "eval_set"
"""A file for each shipped set."""
GYM = "reasoning_gym"
"""The set whose name goes on with a dataset of reasoning-gym."""
KEY = "eval.sets"
NAMES = r"\+*eval\.sets=\[?([\w/,\s-]*)\]?$"
"""An argument that lists sets."""
ADDED = r"\+*(eval\.sets\.\S+)"
ADDED_GYM = rf"\+*eval\.sets\.({GYM}/[\w-]+)\.([\w.]+)=(.*)"
"""One that sets a key of such a set, whose name Hydra cannot read in a key."""


def from_command_line(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """Return the arguments as Hydra reads them, and the names of the only sets that shall be; None for any."""
    names, found = None, []
    for argument in argv:
        if listed := re.match(NAMES, argument):
            names = [name for name in re.split(r"[,\s]+", listed[1]) if name]
            argument = f"++{KEY}={{{','.join(f'{name}: {{}}' for name in names)}}}"
        elif gym := re.match(ADDED_GYM, argument, re.DOTALL):
            nested = gym[3]
            for part in reversed(gym[2].split(".")):
                nested = f"{{{part}: {nested}}}"
            argument = f"++{KEY}={{{gym[1]}: {nested}}}"
        elif re.match(ADDED, argument) or re.match(r"\+*eval\.sets=\{", argument):
            argument = f"++{argument.lstrip('+')}"
        found.append(argument)
    return found, names


def from_file(node: DictConfig) -> None:
    """Turn a list of names in a user's file into the mapping that it stands for, in place; `name:` alone as well."""
    content: Any = OmegaConf.to_container(node)
    section = content.get("eval")
    sets = section.get("sets") if isinstance(section, dict) else None
    if isinstance(sets, str) and not sets.startswith("${"):
        sets = [sets]
    if isinstance(sets, list) and all(isinstance(one, str) for one in sets):
        node.eval.sets = {name: {} for name in sets}
    elif isinstance(sets, dict):
        for name in [name for name, one in sets.items() if one is None]:
            node.eval.sets[name] = {}


def fill(composed: DictConfig, names: list[str] | None) -> None:
    """Give every set all its keys, in place: what was not given is as in the shipped set of its name, else by default.

    Args:
        composed: the whole config.
        names: of the sets that stay, in this order; None keeps all.

    Raises:
        ConfigError: a set of a name that is not shipped has no data.
        OmegaConfBaseException: a key that does not exist, or a value of another kind.
    """
    given = composed.eval.sets
    typed = {str(name): _typed(str(name), given.get(name) or {}) for name in (list(given) if names is None else names)}
    composed.eval.sets = typed


def _typed(name: str, given: Any) -> DictConfig:
    if not isinstance(given, dict | DictConfig):
        raise ConfigError(f"{KEY}.{name}", f"is {given}; set its keys, {KEY}.{name}.data.path=...")
    layers = [{"eval": {"sets": {name: one}}} for one in (_shipped(name) or {}, given)]
    merged = OmegaConf.merge(schema(), *layers)
    found = merged.eval.sets[name]
    data: Any = OmegaConf.to_container(found.data)
    if not data["source"] and not data["path"]:
        raise ConfigError(
            f"{KEY}.{name}",
            f"has no data; give {KEY}.{name}.data.path, or the name of a shipped set; "
            f"{did_you_mean(name, list(shipped_names()))}",
        )
    return found


def shipped_names() -> Iterator[str]:
    """Yield the names of the shipped sets, `reasoning_gym/TASK` for those of reasoning-gym."""
    for file in sorted(FOLDER.glob("*.yaml")):
        yield f"{GYM}/TASK" if file.stem == GYM else file.stem


def _shipped(name: str) -> dict[str, Any] | None:
    """What the shipped set of that name has; None where there is none."""
    stem, _, task = name.partition("/")
    file = FOLDER / f"{stem}.yaml"
    if bool(task) != (stem == GYM) or not re.fullmatch(r"\w+", stem) or not Path(file).is_file():
        return None
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    if task:
        content["data"]["path"] = task
    return content
