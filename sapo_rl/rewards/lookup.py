"""From the name of a reward function in the config to the function."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import sys
import traceback
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from sapo_rl.config import RewardFunctionConfig
from sapo_rl.errors import UserError, did_you_mean
from sapo_rl.rewards.registry import PACKAGES, REWARD_FUNCTIONS, RewardFunction
from sapo_rl.rewards.scoring import GIVEN


def resolve(function: str) -> RewardFunction:
    """Return the reward function called `function`: a built-in's name or a dotted path `package.module.function`.

    The current directory is importable.

    Raises:
        UserError: no such built-in, module or attribute; a module that fails to import; an object that is no function.
    """
    if "." not in function:
        return REWARD_FUNCTIONS.get(function)
    module_name, _, attribute = function.rpartition(".")
    _import_from_here()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(_no_module(function, module_name)) from error
        raise UserError(_import_failed(function, module_name, error)) from error
    except Exception as error:  # the user's module may raise anything
        raise UserError(_import_failed(function, module_name, error)) from error
    if not hasattr(module, attribute):
        raise UserError(_no_attribute(function, module_name, attribute, _callables(vars(module))))
    found = getattr(module, attribute)
    if not callable(found):
        raise UserError(f"reward function '{function}' is a {type(found).__name__}, not a function")
    return found


def check_function(name: str, cfg: RewardFunctionConfig) -> None:
    """Refuse early what `resolve` or the first call would refuse, without importing the user's module.

    Args:
        name: key under `reward.functions`, for the message.
        cfg: the function's configuration.

    Raises:
        UserError: unknown built-in, missing package or module, a file that does not parse or never mentions the
            function, or `args` that a built-in does not take.
    """
    where = f"reward.functions.{name}"
    taken = [key for key in cfg.args if key in GIVEN]
    if taken:
        raise UserError(f"{where}.args: '{taken[0]}' is filled in at every call and cannot be set")
    if "." in cfg.function:
        _check_dotted(where, cfg.function)
        return
    if cfg.function not in REWARD_FUNCTIONS:
        hint = did_you_mean(cfg.function, REWARD_FUNCTIONS)
        raise UserError(
            f"{where}.function: unknown reward function '{cfg.function}'; {hint}\n"
            "  your own is a dotted path such as my_rewards.accuracy"
        )
    if cfg.function in PACKAGES:
        module, project = PACKAGES[cfg.function]
        if _find_spec(module) is None:
            raise UserError(f"{where}.function: '{cfg.function}' needs a package: pip install {project}")
    _check_arguments(where, REWARD_FUNCTIONS.get(cfg.function), cfg.args)


def _check_arguments(where: str, function: RewardFunction, args: dict[str, Any]) -> None:
    settings = {
        key: parameter
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    hints = get_type_hints(function)
    for key, value in args.items():
        if key not in settings:
            valid = did_you_mean(key, settings) or "it takes none"
            raise UserError(f"{where}.args: unknown argument '{key}'; {valid}")
        if not _fits(value, hints[key]):
            hint = re.sub(r"<class '(\w+)'>", r"\1", str(hints[key]))
            raise UserError(f"{where}.args.{key}: {value!r} is a {type(value).__name__}, must be {hint}")
    missing = [k for k, p in settings.items() if p.default is inspect.Parameter.empty and k not in args]
    if missing:
        raise UserError(f"{where}.args: '{missing[0]}' is missing; {did_you_mean(missing[0], settings)}")
    empty: dict[str, list[Any]] = {
        key: [] for key, p in inspect.signature(function).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD
    }
    try:
        function(**empty, **args)  # no sample: checks the settings' values only
    except UserError as error:
        raise UserError(f"{where}.args: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    options = get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, options[0]) for item in value)
    if get_origin(hint) is Union or options:
        return any(_fits(value, option) for option in options)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _check_dotted(where: str, function: str) -> None:
    module_name, _, attribute = function.rpartition(".")
    _import_from_here()
    spec = _find_spec(module_name)
    if spec is None:
        raise UserError(f"{where}.function: {_no_module(function, module_name)}")
    if spec.origin is None or not spec.origin.endswith(".py"):
        return
    text = Path(spec.origin).read_text(encoding="utf-8")
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise UserError(f"{where}.function: {spec.origin}:{error.lineno}: syntax error: {error.msg}") from error
    if not re.search(rf"\b{re.escape(attribute)}\b", text) and "import *" not in text:
        known = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        raise UserError(f"{where}.function: {_no_attribute(function, spec.origin, attribute, known)}")


def _find_spec(module: str) -> ModuleSpec | None:
    """Like `importlib.util.find_spec`, which would import the parent packages."""
    path, spec, parts = None, None, module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        spec = next((s for finder in sys.meta_path if (s := finder.find_spec(name, path)) is not None), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
        if path is None and depth < len(parts):
            return None
    return spec


def _import_from_here() -> None:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _callables(names: dict[str, Any]) -> list[str]:
    return [key for key, value in names.items() if inspect.isfunction(value) and not key.startswith("_")]


def _no_module(function: str, module: str) -> str:
    return f"reward function '{function}': there is no module '{module}' (searched in {os.getcwd()} and sys.path)"


def _no_attribute(function: str, module: str, attribute: str, known: list[str]) -> str:
    hint = did_you_mean(attribute, known)
    return f"reward function '{function}': '{module}' has no '{attribute}'{'; ' if hint else ''}{hint}"


def _import_failed(function: str, module: str, error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = error.lineno if isinstance(error, SyntaxError) else last.lineno
    file = error.filename if isinstance(error, SyntaxError) else last.filename
    cause = f"{type(error).__name__}: {error} ({file}:{line})"
    return f"reward function '{function}': importing '{module}' failed: {cause}"
