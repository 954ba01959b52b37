"""What Hydra and OmegaConf raise about a user's config, in two lines that name the key or file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sapo_rl.config.nested import leaves
from sapo_rl.config.schema import schema
from sapo_rl.errors import UserError, brief, did_you_mean, first_line
from sapo_rl.errors.files import is_file, read_yaml
from sapo_rl.paths import CONFIGS
from sapo_rl.run import user_file
from sapo_rl.run.checks import ConfigError
from sapo_rl.run.compose import FULL_ERROR, Arguments, first_match, recipes
from sapo_rl.run.other_names import hint

PROBLEM = r"(Value .*|Invalid .*|Cannot .*|Incompatible .*|object of type .*|.*[Ii]nterpolation .*)"
"""OmegaConf's lines that say what is wrong with a value."""

OWN_ENTRIES = {
    "RewardFunctionConfig": ("reward.functions", "function"),
    "EnvironmentConfig": ("environments", "name"),
    "EvalSetConfig": ("eval.sets", "data.path"),
}
"""Where mappings have entries with names of the user's own, by their schema, and the key that each needs."""


def explain(error: Exception, arguments: Arguments) -> str:
    """Say a composition error in one or two lines: key or file, where it was set, nearest valid name.

    Any exception is told: what a user's files and arguments have caused has many kinds.
    """
    try:
        return brief(_explain(error, arguments))
    except (UserError, RecursionError):  # a file that has changed meanwhile
        return brief(_unforeseen(error, arguments))


def _explain(error: Exception, arguments: Arguments) -> str:
    text = _chain(error)
    if isinstance(error, ConfigError):
        return f"{error.key} ({origin(error.key, arguments)}): {error.problem}"
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    if ambiguous := first_match(r"Ambiguous value for argument '(.*)'", text):
        key, _, values = ambiguous.partition("=")
        return f"'{ambiguous}' (command line): add -m to sweep over the values, or write {key}=[{values}] for a list"
    if added := first_match(r"An item is already at '([^']+)'", text) or _added_group(text, arguments):
        return f"+{added} (command line): {added} is there already; leave out the +"
    if group := first_match(r"Multiple values for (\w+)\.", text):
        file = ", ".join(map(str, arguments.files.values())) or "command line"
        return f"{group} ({file}): in `defaults` it is chosen already; write `- override /{group}: NAME`"
    if found := re.search(r"Could not delete from config\. ((?:The value of )?'([^']+)'.*)", text):
        return f"~{found[2]} (command line): cannot be taken out: {found[1]}"
    if isinstance(error, MissingConfigException) and str(error.missing_cfg_file).startswith("config/"):
        name = str(error.missing_cfg_file).removeprefix("config/")
        file = arguments.files.get(first_match(r"In 'config/([^']*)'", text), "command line")
        return f"config ({file}): no recipe '{name}'; {did_you_mean(name, recipes())}"
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).partition("/")
        path = {"model": "; your own is model.path=...", "loss": "; your own is loss.name=..."}.get(group, "")
        if group == "hydra":  # a launcher or sweeper is called kind/name
            kind, _, plugin = name.partition("/")
            path = f"; others are packages: pip install hydra-{plugin}-{kind}"
        return f"{group}: no choice '{name}'; {did_you_mean(name, error.options)}{path}"
    if group := first_match(r"Could not override '([^']+)'\. No match in the defaults list", text):
        file = arguments.files.get(first_match(r"In 'config/([^']*)'", text), "command line")
        name = group.partition("@")[0].removeprefix("config/")
        return f"config ({file}): in `defaults`, no group '/{name}' to override; as in {user_file.DEFAULTS}"
    key = first_match(r"Could not override '([^']+)'", text) or first_match(r"full_key: (\S+)", text)
    if key and re.search(r"Key '[^']*' (is )?not in", text):
        return f"{key} ({origin(key, arguments)}): no such key; {nearest_key(key)}"
    if key and (found := re.search(rf"([\w-]+) is not a subclass of ({'|'.join(OWN_ENTRIES)})", text)):
        own = _no_entry(key.rpartition(".")[2], found[1], found[2], arguments)
        if own is not None:
            return own
    if key and (section := _section(first_match(r"Error merging override [+]*([\w.]+)=", text))) is not None:
        whole, names = section
        told = f"has keys of its own; set those: {', '.join(names)}" if names else "is a mapping with names of your own"
        return f"{whole} ({origin(whole, arguments)}): {told}"
    if key and "is not a ListConfig" in text:
        return f"{key} ({origin(key, arguments)}): must be a list, in brackets: {key}=[...]"
    if key and "is not Optional" in text:
        return f"{key} ({origin(key, arguments)}): cannot be null"
    if key:
        return f"{key} ({origin(key, arguments)}): {first_match(PROBLEM, text) or _cause(text)}"
    return _unforeseen(error, arguments)


def _added_group(text: str, arguments: Arguments) -> str:
    """The group that the command line adds with a + to the choice that is there; empty where a file does that."""
    group = first_match(r"Multiple values for (\w+)\.", text)
    return group if any(argument.startswith(f"+{group}=") for argument in arguments.argv) else ""


def _no_entry(name: str, found: str, kind: str, arguments: Arguments) -> str | None:
    """Tell of an entry of the user's own that is no mapping, or that has a value of the wrong kind in it."""
    parent, first = OWN_ENTRIES[kind]
    key = f"{parent}.{name}"
    if name in schema():  # the one environment, which has no name of the user's own
        return None
    if found == "dict":
        problem = f"has a value of the wrong kind; sapo-train keys {parent} tells what each key takes"
    else:
        problem = f"is a {found}; set its keys, {key}.{first}=..., with + a new one's"
    return f"{key} ({origin(key, arguments)}): {problem}"


def _section(key: str | None) -> tuple[str, list[str]] | None:
    """The key with those below it, where it has any; None for one that takes a value."""
    try:
        node = OmegaConf.select(schema(), key) if key else None
    except OmegaConfBaseException:  # it leads through a list
        return None
    return (key, [f"{key}.{name}" for name in node]) if key and isinstance(node, DictConfig) else None


def _unreadable(error: OverrideParseException) -> str:
    override = str(error.override)
    if override.endswith((".yaml", ".yml")):
        return f"'{override}' (command line): write config={override}"
    return f"'{override}' (command line) cannot be read as key=value: {first_line(error)}"


def _unforeseen(error: Exception, arguments: Arguments) -> str:
    """Word an exception of which nothing else is known: the file or key that was being read, kind, text."""
    notes = getattr(error, "__notes__", [])
    where = notes[0] if notes else ", ".join(map(str, arguments.files.values())) or "the command line"
    if isinstance(error, RecursionError):
        return f"{where}: something in it refers to itself, or is nested too deeply"
    kind = "" if isinstance(error, HydraException | OmegaConfBaseException) else f"{type(error).__name__}: "
    return f"{where}: {kind}{_cause(_chain(error))}\n  {FULL_ERROR}=1 in the environment shows where it came about"


def _cause(text: str) -> str:
    """The first line, or two where the first only says in which file; OmegaConf's coordinates are none."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "full_key:" not in line]
    return " ".join(lines[: 2 if lines[0].startswith("In '") else 1]) if lines else ""


def _chain(error: BaseException | None) -> str:
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__
    return "\n".join(texts)


def nearest_key(key: str) -> str:
    """The valid names beside the first part of `key` that is wrong, or how to add an entry that is not there."""
    node: Any = schema()
    before = ""
    parts = key.split(".")
    for place, part in enumerate(parts):
        if not isinstance(node, DictConfig):
            return ""
        options = [str(option) for option in node]
        if not options and before in user_file.ENTRIES:  # names of the user's own
            node = OmegaConf.structured(user_file.ENTRIES[before][0])
        elif options and part not in options:
            return _elsewhere(parts[place:]) or did_you_mean(part, options)
        else:
            node = None if not options or OmegaConf.is_missing(node, part) else node[part]
        before = part
    return f"to add it, write +{key}=..."


def _elsewhere(parts: list[str]) -> str:
    """Point to a key that is right but for its section, or that other programs call so, it or a section it is in."""
    everything: Any = OmegaConf.to_container(schema())
    found = [path for path, _ in leaves(everything) if path.rpartition(".")[2] == parts[-1]]
    sections = (hint(part, []) for part in reversed(parts[:-1]))
    return hint(parts[-1], found) or next(filter(None, sections), "")


def origin(key: str, arguments: Arguments) -> str:
    """Return where the effective value of `key` was set: the command line, a file, or the defaults."""
    argv = arguments.argv
    for name, _, value in (argument.partition("=") for argument in argv):
        one = name.lstrip("+~")
        if f"{one}.".startswith(f"{key}.") or (
            value[:1] == "{" and key.startswith(f"{one}.")
        ):  # it, a part, or a whole
            return "command line"
    choices = dict(argument.split("=", 1) for argument in argv if re.fullmatch(r"\w+=[^=]*", argument))
    names = [name.strip() for name in choices.get("config", "default").strip("[]").split(",")]
    paths = [arguments.files.get(name, CONFIGS / "config" / f"{name}.yaml") for name in reversed(names)]
    for path in paths:
        if _holds(path, key):
            return str(path)
    group, _, rest = key.partition(".")
    for path in [CONFIGS / group / f"{choice}.yaml" for choice in _chosen(group, choices, paths)]:
        if _holds(path, rest) or _holds(path, key):
            return str(path)
    return "default"


def _chosen(group: str, choices: dict[str, str], recipe_files: list[Path]) -> Iterator[str]:
    """The group's option, as the command line, the recipe or train.yaml picks it: the first that says so wins."""
    if group in choices:
        yield choices[group]
        return
    for path in [*recipe_files, CONFIGS / "train.yaml"]:
        for entry in (_read(path) or {}).get("defaults") or []:
            if isinstance(entry, dict):
                for name, option in entry.items():
                    if name.removeprefix("override").strip().strip("/") == group:
                        yield str(option)
                        return


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path) if is_file(path) else None
    return content if isinstance(content, dict) else {}


def _holds(path: Path, key: str) -> bool:
    return _leads(_read(path), re.sub(r"\[\d+\]", "", key))


def _leads(node: Any, key: str) -> bool:
    """Whether `key` leads through the mapping `node`, whose names may have dots in them."""
    named = {str(name): value for name, value in node.items()} if isinstance(node, dict) else {}
    return key in named or any(
        key.startswith(f"{name}.") and _leads(value, key.removeprefix(f"{name}.")) for name, value in named.items()
    )
