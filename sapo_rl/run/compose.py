"""From a command line to a checked config: recipes by name or path, and errors that say where a value was set."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from sapo_rl.config import Config, EnvironmentConfig, RewardFunctionConfig
from sapo_rl.config.evaluation import EvalConfig
from sapo_rl.config.loss import unread
from sapo_rl.config.nested import dumps, leaves
from sapo_rl.config.schema import schema
from sapo_rl.errors import UserError, did_you_mean
from sapo_rl.errors.files import expand, is_file
from sapo_rl.paths import CONFIGS
from sapo_rl.run import earlier, eval_sets, packaged, references, user_file
from sapo_rl.run.checks import ConfigError, check
from sapo_rl.run_folder import CONFIG
from sapo_rl.run_folder.secrets import is_secret, worth_hiding

FULL_ERROR = "HYDRA_FULL_ERROR"
"""Variable that asks for the traceback of what composing a config raises."""
ADDED_FUNCTION = (
    r"\+\+?reward\.functions\.([\w-]+)(\.(function|weight|style|scope|timeout|on_error|retries|concurrency))?="
)
ADDED_ENVIRONMENT = r"\+\+?environments\.([\w-]+)(\.(name|max_turns|max_tokens|turn_timeout|workers|on_error))?="

ARGS = r"[a-z][\w.-]*\.(args|chat_template_args)[.=]"
"""A key that the user's own code, or a generator, has a name for: Hydra wants a + where the recipe has none."""

START = ("run_dir", "fork", "step")
"""Keys of this start alone, not of a later one with the same config."""

GLOBAL = "# @package _global_"
"""First line of a group's file that sets keys of other sections as well."""


def recipes() -> dict[str, Path]:
    """Return the files of the shipped recipes by their names."""
    return {file.stem: file for file in sorted((CONFIGS / "config").glob("*.yaml"))}


def description(recipe: Path) -> str:
    """Return what a recipe's file says of it in one line."""
    return str((yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}).get("description", ""))


@dataclass
class _OpenEval(EvalConfig):
    """The schema of evaluations as Hydra gets it: of a set only those keys that are given."""

    sets: dict[str, Any] = field(default_factory=dict)  # pyright: ignore[reportIncompatibleVariableOverride]


@dataclass(frozen=True)
class Arguments:
    """A command line, made ready for Hydra."""

    argv: list[str]
    """The arguments, files replaced by the names under which they are registered."""
    files: dict[str, Path] = field(default_factory=dict)
    """The user's files by those names."""
    added: list[str] = field(default_factory=list)
    """Names of reward functions that the command line adds to those of the recipe."""
    sets: list[str] | None = None
    """Names of the sets of evaluations that shall be, in place of those of the recipe; None leaves these."""


def register(argv: list[str], folder: str | None = None) -> Arguments:
    """Make user files known to Hydra as recipes.

    `config=path/to/file.yaml` becomes `config=<stem>`, and `config=NAME` is `folder/config/NAME.yaml` where the folder
    of the user's own groups has one; `resume=FOLDER` and `fork=FOLDER` become the recipe that the folder holds. A new
    reward function (`+reward.functions.NAME.function=...`) or environment (`+environments.NAME.name=...`) is entered
    into the schema, to which Hydra cannot add it; sets of evaluations are typed in `accept`.

    Raises:
        UserError: a file that is missing or no mapping, or a name that no recipe has.
    """
    added, environments = _added(argv, ADDED_FUNCTION), _added(argv, ADDED_ENVIRONMENT)
    argv, sets = eval_sets.from_command_line(argv)
    open_schema = copy.deepcopy(schema())
    open_schema.eval = _OpenEval()
    open_schema.reward.functions = {name: RewardFunctionConfig() for name in added}
    open_schema.environments = {name: EnvironmentConfig() for name in environments}
    ConfigStore.instance().store(name="schema", node=open_schema)
    known, files, rewritten = recipes(), {}, []
    own = {path.stem: path for path in expand(folder).glob("config/*.yaml")} if folder else {}
    for argument in earlier.arguments_of(argv, partial(_name_of, known=known, own=own, files=files)):
        if re.match(f"{ADDED_FUNCTION}|{ADDED_ENVIRONMENT}", argument):
            argument = argument.lstrip("+")
            if re.match(r"[a-z.]+\.[\w-]+=\{", argument):  # it may hold args, whose keys are the user's
                argument = f"++{argument}"
        if re.match(ARGS, argument):
            argument = f"++{argument}"
        key, equals, value = argument.partition("=")
        _check_choice(key, equals, value)
        if key != "config" or not equals:
            rewritten.append(argument)
            continue
        items = [value] if is_file(value) else value.strip("[]").split(",")
        names = [_register_one(item.strip(), known, own, files) for item in items]
        joined = ",".join(names)
        listed = value.startswith("[") and items != [value]
        rewritten.append(f"config=[{joined}]" if listed else f"config={joined}")
    return Arguments(_with_choices(rewritten), files, added, sets)


def _added(argv: list[str], pattern: str) -> list[str]:
    """The names that arguments of this form add to the config, each once."""
    return list(dict.fromkeys(found[1] for argument in argv if (found := re.match(pattern, argument))))


def _check_choice(key: str, equals: str, value: str) -> None:
    """Raise where an argument has no key, or chooses from a group what is no name."""
    if equals and not key.strip("+~ "):
        raise UserError(f"'{key}={value}' (command line): there is no key before the =")
    group = key.lstrip("+~")
    choices = [path.stem for path in (CONFIGS / group).glob("*.yaml")] if re.fullmatch(r"[a-z]+", group) else []
    if not (equals and choices) or group == "config":
        return
    if value.startswith("["):
        first = value.strip("[]").partition(",")[0]
        raise UserError(f"{group} (command line): '{value}' is a list, must be a name; {did_you_mean(first, choices)}")
    if not all(_reads_as_text(part.strip(), group) for part in value.split(",")):
        raise UserError(f"{group} (command line): '{value}' is no name; {did_you_mean(value, choices)}")


def _with_choices(argv: list[str]) -> list[str]:
    """Have `GROUP=CHOICE` win over a recipe that sets keys of the group by itself: Hydra lets the recipe win."""
    typed = _keys(argv)
    expanded = list[str]()
    for argument in argv:
        expanded.append(argument)
        expanded += [f"{key}={as_override(value)}" for key, value in _chosen_keys(argument) if key not in typed]
    return expanded


def _forget_unread(composed: DictConfig, overrides: Sequence[str]) -> None:
    """Where the overrides choose `loss=CHOICE`, put back what the config sets for another loss, but for what is typed.

    A baseline is so one word away from a recipe with settings of its loss.
    """
    if not any(re.fullmatch(r"loss=[\w.-]+", override) for override in overrides):
        return
    typed = {".".join(key.split(".")[:2]) for key in _keys(overrides)}
    for key, default in unread(str(composed.loss.name)).items():
        if f"loss.{key}" not in typed:
            composed.loss[key] = default


def _check_choices(composed: DictConfig, overrides: Sequence[str]) -> None:
    """Raise ConfigError where a recipe hides a part of `GROUP=CHOICE`, as it does in a sweep over choices."""
    typed = _keys(overrides)
    for override in overrides:
        for key, value in _chosen_keys(override):
            if key not in typed and OmegaConf.select(composed, key) != value:
                raise ConfigError(key, f"hides what {override} sets it to, {value}; take it out there")


def _keys(overrides: Sequence[str]) -> set[str]:
    return {override.partition("=")[0].lstrip("+~") for override in overrides}


def _chosen_keys(override: str) -> Iterator[tuple[str, Any]]:
    """What the file of a `GROUP=CHOICE` sets; nothing for another override, or a recipe."""
    group, _, choice = override.partition("=")
    file = CONFIGS / group / f"{choice}.yaml"
    if group != "config" and re.fullmatch(r"\w+=[\w.-]+", override) and is_file(file):
        everywhere = file.read_text(encoding="utf-8").startswith(GLOBAL)
        content: Any = OmegaConf.to_container(OmegaConf.load(file))
        yield from leaves(content, "" if everywhere else group)


def as_override(value: Any) -> str:
    """Return a value as Hydra reads it back behind `key=`."""
    return earlier.quoted(value) if isinstance(value, str) else json.dumps(value)


def _register_one(value: str, known: dict[str, Path], own: dict[str, Path], files: dict[str, Path]) -> str:
    if value in known and value not in own:
        return value
    name, path = _name_of(value, known, own, files), own.get(value, expand(value))
    if not is_file(path):
        raise UserError(f"config: no file '{value}'")
    node = user_file.load(path, CONFIGS)
    for key in ("resume", "fork"):
        if path.name == CONFIG and key in node:  # what an earlier run was told of its own start
            node[key] = None
        elif node.get(key):
            raise UserError(f"{key} ({path}): belongs on the command line: sapo-train {key}={node[key]}")
    files[name] = path
    ConfigStore.instance().store(group="config", name=name, node=node, package="_global_")
    return name


def _name_of(value: str, known: dict[str, Path], own: dict[str, Path], files: dict[str, Path]) -> str:
    """The name under which a recipe is registered, and its runs lie; `files` are those that are registered already."""
    if value in known and value not in own:
        return value
    path = own.get(value, expand(value))
    if path.suffix not in (".yaml", ".yml"):
        options = did_you_mean(value, [*known, *own])
        raise UserError(f"config: no recipe '{value}'; {options}, or a path to a .yaml file")
    stem = path.parent.name if path.name == CONFIG else path.stem
    if not _reads_as_text(stem):
        stem = "_" + re.sub(r"[^\w.-]", "_", stem, flags=re.ASCII)
    return next(name for name in _candidates(stem) if name not in {*known, *own, *files})


def _reads_as_text(name: str, group: str = "config") -> bool:
    """Whether Hydra takes `name` for the text that it is, not for a number or a mistake."""
    try:
        read = OverridesParser.create().parse_overrides([f"{group}={name}"])[0].value()
        return read == name and "${" not in name
    except (OverrideParseException, ValueError):
        return False


def _candidates(stem: str) -> Iterator[str]:
    yield stem
    number = 2
    while True:
        yield f"{stem}-{number}"
        number += 1


def accept(
    composed: DictConfig,
    arguments: Arguments,
    overrides: Sequence[str],
    only: Sequence[str] = (),
    training: bool = True,
) -> tuple[Config, str]:
    """Turn what Hydra composed into real dataclasses, checked, and into the YAML that the run folder keeps.

    The YAML is resolved but for what comes from the environment, which it only refers to: `${oc.env:NAME}` is read anew
    by every rank.

    Args:
        composed: it is changed.
        arguments: from which it was composed.
        overrides: the same, as Hydra has read them; in a sweep those of this job.
        only: names of the reward functions that shall stay; none stands for all.
        training: whether it shall be trained with; else rules on training are left out.

    Raises:
        ConfigError: naming the key.
        OmegaConfBaseException: a key that does not exist.
    """
    _check_choices(composed, overrides)
    _forget_unread(composed, overrides)
    OmegaConf.set_struct(composed, False)
    functions = composed.reward.functions
    for name in [name for name in functions if only and name not in only]:
        del functions[name]
    for name in arguments.added:  # the recipe's come first
        functions[name] = functions.pop(name)
    eval_sets.fill(composed, arguments.sets)
    _refuse_secrets(OmegaConf.to_container(composed))
    try:
        frozen = references.resolve(composed)
        user_file.check_shape(frozen, CONFIGS)
        _settle_paths(frozen)
        asked = {key: frozen[key] for key in START}
        frozen |= dict.fromkeys(START)
        text = dumps(frozen)
        config = loads(text)  # as every rank will: it refuses keys that a + has added where there are none
        config.run_dir, config.fork, config.step = (asked[key] for key in START)
    except MissingMandatoryValue as error:
        key = first_match(r"full_key: (\S+)", str(error)) or first_match(r"value: (\S+)", str(error))
        raise ConfigError(key, "must be given") from error
    check(config, training)
    return config, text


def _refuse_secrets(node: Any, key: str = "") -> None:
    if isinstance(node, dict):
        for name, value in node.items():
            _refuse_secrets(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for value in node:
            _refuse_secrets(value, key)
    elif is_secret(key) and worth_hiding(node):
        raise ConfigError(key, "is a secret in plain text; refer to it as ${oc.env:NAME} instead")


def _settle_paths(frozen: dict[str, Any]) -> None:
    """Name local models and files by their whole and real path: a resume may start elsewhere, and links move on."""
    model = frozen["model"]
    if os.path.isfile(expand(model["path"]) / "config.json"):
        model["path"] = _real(model["path"])
    elif folder := packaged.folder_of(model["path"]):
        model["path"] = str(folder)
    for data in (frozen["data"], *(one["data"] for one in frozen["eval"]["sets"].values())):
        if data["source"] in ("file", "huggingface", None):
            data |= {key: _real(data[key]) for key in ("path", "eval_path") if data.get(key) is not None}
    rates = frozen["data"]["pass_rate"]
    rates["path"] = rates["path"] and _real(rates["path"])


def _real(text: str) -> str:
    """The real path, or `text` itself where there is no such file; a link from a name with another ending stays."""
    path = expand(text)
    if not os.path.exists(path):
        return text
    real = path.resolve()
    return str(real if real.suffix == path.suffix else path.parent.resolve() / path.name)


def loads(frozen: str) -> Config:
    """Turn the text of a frozen config (`config.yaml` of a run folder) into a `Config`."""
    merged = OmegaConf.merge(schema(), OmegaConf.create(frozen))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def first_match(pattern: str, text: str) -> str:
    """Return what the first group of a pattern matches in a text; empty where nothing does."""
    found = re.search(pattern, text)
    return found.group(1) if found else ""
