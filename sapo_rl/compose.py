"""From a command line to a checked config: recipes by name or path, and errors that say where a value was set."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from sapo_rl.checks import ConfigError, check
from sapo_rl.config import Config, LossConfig, RewardConfig, RewardFunctionConfig
from sapo_rl.errors import UserError, did_you_mean
from sapo_rl.run import references
from sapo_rl.run_folder import CONFIG, is_secret, locate, worth_hiding

PACKAGED = Path(__file__).parent / "configs"
CONFIGS = PACKAGED if PACKAGED.is_dir() else Path(__file__).parents[1] / "configs"
"""The shipped configs: inside the wheel, or beside the package in a checkout."""


ELSEWHERE = {
    "num_generations": "rollout.group_size",
    "n": "rollout.group_size",
    "max_completion_length": "rollout.max_completion_tokens",
    "max_tokens": "rollout.max_completion_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "per_device_train_batch_size": "rollout.batch_size",
    "train_batch_size": "rollout.batch_size",
    "gradient_accumulation_steps": "trainer.tokens_per_micro_batch",
    "num_iterations": "trainer.updates_per_rollout",
    "beta": "loss.kl.coef",
    "kl_coef": "loss.kl.coef",
    "epsilon": "loss.clip_low",
    "epsilon_high": "loss.clip_high",
    "loss_type": "loss.name",
    "sapo_temperature_pos": "loss.tau_pos",
    "sapo_temperature_neg": "loss.tau_neg",
    "lr": "trainer.learning_rate",
    "lr_scheduler_type": "trainer.schedule",
    "warmup_steps": "trainer.warmup_updates",
    "max_steps": "trainer.steps",
    "save_steps": "checkpoint.every",
    "eval_steps": "eval.every",
    "report_to": "logging.wandb",
    "scale_rewards": "advantage.scale",
    "mask_truncated_completions": "advantage.mask_truncated",
    "r": "model.lora.rank",
    "output_dir": "run_dir",
}
"""What other programs call some keys, and what they are called here."""
ADDED_FUNCTION = r"\+reward\.functions\.([\w-]+)(\.(function|weight|timeout|on_error))?="


def recipes() -> dict[str, str]:
    """Return the shipped recipes' names, each with its one-line description."""
    files = sorted((CONFIGS / "config").glob("*.yaml"))
    return {
        file.stem: str((yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("description", ""))
        for file in files
    }


@dataclass(frozen=True)
class Arguments:
    """A command line, made ready for Hydra."""

    argv: list[str]
    """The arguments, files replaced by the names under which they are registered."""
    files: dict[str, Path] = field(default_factory=dict)
    """The user's files by those names."""
    added: list[str] = field(default_factory=list)
    """Names of reward functions that the command line adds to those of the recipe."""


def register(argv: list[str]) -> Arguments:
    """Make user files known to Hydra as recipes.

    `config=path/to/file.yaml` becomes `config=<stem>`; `resume=FOLDER` becomes the recipe that the folder holds. A new
    reward function (`+reward.functions.NAME.function=...`) is entered into the schema, to which Hydra cannot add it.

    Raises:
        UserError: a file that is missing or no mapping, or a name that no recipe has.
    """
    added = list(dict.fromkeys(found[1] for argument in argv if (found := re.match(ADDED_FUNCTION, argument))))
    functions = {name: RewardFunctionConfig() for name in added}
    ConfigStore.instance().store(name="schema", node=Config(reward=RewardConfig(functions=functions)))
    known, files, rewritten = recipes(), {}, []
    for argument in _with_resumed(argv):
        if re.match(ADDED_FUNCTION, argument):
            argument = argument.removeprefix("+")
        key, equals, value = argument.partition("=")
        if key != "config" or not equals:
            rewritten.append(argument)
            continue
        items = [value] if Path(value).is_file() else value.strip("[]").split(",")
        names = [_register_one(item.strip(), known, files) for item in items]
        joined = ",".join(names)
        listed = value.startswith("[") and items != [value]
        rewritten.append(f"config=[{joined}]" if listed else f"config={joined}")
    return Arguments(_with_choices(rewritten), files, added)


def _with_choices(argv: list[str]) -> list[str]:
    """Have `GROUP=CHOICE` win over a recipe that sets keys of the group by itself: Hydra lets the recipe win."""
    typed = _keys(argv)
    expanded = list[str]()
    for argument in argv:
        expanded.append(argument)
        expanded += [f"{key}={_as_override(value)}" for key, value in _chosen_keys(argument) if key not in typed]
    return expanded


def check_choices(composed: DictConfig, overrides: Sequence[str]) -> None:
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
    if group != "config" and re.fullmatch(r"\w+=[\w.-]+", override) and file.is_file():
        yield from _leaves(OmegaConf.to_container(OmegaConf.load(file)), group)


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value


def _as_override(value: Any) -> str:
    return _quoted(value) if isinstance(value, str) else json.dumps(value)


def _with_resumed(argv: list[str]) -> list[str]:
    folders = [argument.partition("=")[2] for argument in argv if argument.startswith("resume=")]
    if not folders:
        return argv
    if any(argument.startswith("config=") for argument in argv):
        raise UserError("resume continues with the config of its run folder: leave config= out, override single keys")
    folder = locate(folders[-1])
    # Quoted: Hydra would stumble over some characters of a path.
    others = [argument for argument in argv if not argument.startswith("resume=")]
    return [f"config={folder / CONFIG}", f"resume={_quoted(str(folder))}", *others]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def _register_one(value: str, known: dict[str, str], files: dict[str, Path]) -> str:
    if value in known:
        return value
    path = Path(value).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"config: no recipe '{value}'; {did_you_mean(value, known)}, or a path to a .yaml file")
    if not path.is_file():
        raise UserError(f"config: no file '{value}'")
    try:
        node = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"config: {value} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"config: {value} must hold a mapping of keys to values")
    content: Any = OmegaConf.to_container(node)
    for entry in content.get("defaults") or []:
        if isinstance(entry, dict) and any(name.split()[-1].strip("/") == "config" for name in entry):
            raise UserError(f"config: {value}: in `defaults`, name a recipe alone: [quickstart, _self_], not {entry}")
    stem = path.parent.name if path.name == "config.yaml" else path.stem
    if not _reads_as_text(stem):
        stem = "_" + re.sub(r"[^\w.-]", "_", stem, flags=re.ASCII)
    name = next(name for name in _candidates(stem) if name not in known and name not in files)
    files[name] = path
    ConfigStore.instance().store(group="config", name=name, node=node, package="_global_")
    return name


def _reads_as_text(name: str) -> bool:
    """Whether Hydra takes `name` for the text that it is, not for a number or a mistake."""
    try:
        return OverridesParser.create().parse_overrides([f"config={name}"])[0].value() == name
    except OverrideParseException:
        return False


def _candidates(stem: str) -> Iterator[str]:
    yield stem
    number = 2
    while True:
        yield f"{stem}-{number}"
        number += 1


def accept(composed: DictConfig, arguments: Arguments) -> tuple[Config, str]:
    """Turn what Hydra composed into real dataclasses, checked, and into the YAML that the run folder keeps.

    The YAML is resolved but for what comes from the environment, which it only refers to: `${oc.env:NAME}` is read anew
    by every rank.

    Raises:
        ConfigError: naming the key.
        OmegaConfBaseException: a key that does not exist.
    """
    OmegaConf.set_struct(composed, False)
    functions = composed.reward.functions
    for name in arguments.added:  # the recipe's come first
        functions[name] = functions.pop(name)
    _refuse_secrets(OmegaConf.to_container(composed))
    try:
        frozen = references.resolve(composed)
        _settle_paths(frozen)
        chosen, frozen["run_dir"] = frozen["run_dir"], None  # of this start alone, not of a later one with this config
        text = yaml.safe_dump(frozen, sort_keys=False, allow_unicode=True)
        config = loads(text)  # as every rank will: it refuses keys that a + has added where there are none
        config.run_dir = chosen
    except MissingMandatoryValue as error:
        key = _match(r"full_key: (\S+)", str(error)) or _match(r"value: (\S+)", str(error))
        raise ConfigError(key, "must be given") from error
    check(config)
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
    model, data = frozen["model"], frozen["data"]
    if os.path.isfile(Path(model["path"]).expanduser() / "config.json"):
        model["path"] = _real(model["path"])
    if data["source"] in ("file", "huggingface"):
        data |= {key: _real(data[key]) for key in ("path", "eval_path") if data[key] is not None}


def _real(text: str) -> str:
    """The real path, or `text` itself where there is no such file; a link from a name with another ending stays."""
    path = Path(text).expanduser()
    if not os.path.exists(path):
        return text
    real = path.resolve()
    return str(real if real.suffix == path.suffix else path.parent.resolve() / path.name)


def loads(frozen: str) -> Config:
    """Turn the text of a frozen config (`config.yaml` of a run folder) into a `Config`."""
    merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(frozen))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def explain(error: Exception, arguments: Arguments) -> str:
    """Say a composition error in one or two lines: key, where it was set, nearest valid name."""
    text = _chain(error)
    if isinstance(error, ConfigError):
        return f"{error.key} ({origin(error.key, arguments)}): {error.problem}"
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OverrideParseException) and str(error.override).endswith((".yaml", ".yml")):
        return f"'{error.override}' (command line): write config={error.override}"
    if isinstance(error, OverrideParseException):
        return f"'{error.override}' (command line) cannot be read as key=value: {str(error).splitlines()[0]}"
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).partition("/")
        if group == "loss" and name in LossConfig.__dataclass_fields__["name"].metadata["choices"]:
            return f"loss: no choice '{name}'; write loss.name={name}"
        path = "; your own is model.path=..." if group == "model" else ""
        return f"{group}: no choice '{name}'; {did_you_mean(name, error.options)}{path}"
    key = _match(r"Could not override '([^']+)'", text) or _match(r"full_key: (\S+)", text)
    if key and re.search(r"Key '[^']*' (is )?not in", text):
        return f"{key} ({origin(key, arguments)}): no such key; {nearest_key(key)}"
    if key and (problem := _match(r"(Value .*|Invalid .*|Cannot .*|Incompatible .*|object of type .*)", text)):
        return f"{key} ({origin(key, arguments)}): {problem}"
    return " ".join(line.strip() for line in text.splitlines()[:2])


def _chain(error: BaseException | None) -> str:
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__
    return "\n".join(texts)


def _match(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1) if found else ""


def nearest_key(key: str) -> str:
    """The valid names beside the first part of `key` that is wrong, or how to add an entry that is not there."""
    node: Any = OmegaConf.structured(Config)
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            return ""
        options = [str(option) for option in node]
        if not options and key.startswith("reward.functions."):  # names of the user's own
            node = OmegaConf.structured(RewardFunctionConfig)
        elif part not in options:
            return _elsewhere(key) or did_you_mean(part, options)
        else:
            node = None if OmegaConf.is_missing(node, part) else node[part]
    return f"to add it, write +{key}=..."


def _elsewhere(key: str) -> str:
    """Point to a key that is right but for its section, or that other programs call so."""
    name = key.rpartition(".")[2]
    schema = _leaves(OmegaConf.to_container(OmegaConf.structured(Config)), "")
    found = [path.lstrip(".") for path, _ in schema if path.rpartition(".")[2] == name]
    found += [ELSEWHERE[name]] if name in ELSEWHERE else []
    return f"did you mean {' or '.join(found)}?" if found else ""


def origin(key: str, arguments: Arguments) -> str:
    """Return where the effective value of `key` was set: the command line, a file, or the defaults."""
    argv = arguments.argv
    if any(argument.partition("=")[0].lstrip("+~") == key for argument in argv):
        return "command line"
    choices = dict(argument.split("=", 1) for argument in argv if re.fullmatch(r"\w+=[^=]*", argument))
    names = [name.strip() for name in choices.get("config", "default").strip("[]").split(",")]
    paths = [arguments.files.get(name, CONFIGS / "config" / f"{name}.yaml") for name in reversed(names)]
    for path in paths:
        if _holds(path, key):
            return str(path)
    group, _, rest = key.partition(".")
    for path in [CONFIGS / group / f"{choice}.yaml" for choice in _chosen(group, choices, paths)]:
        if _holds(path, rest):
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
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return content if isinstance(content, dict) else {}


def _holds(path: Path, key: str) -> bool:
    node: Any = _read(path)
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True
