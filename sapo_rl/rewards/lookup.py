"""From the name of a reward function in the config to the function."""

from __future__ import annotations

import inspect
import re
from typing import Any, Union, get_args, get_origin, get_type_hints

from sapo_rl import plugins
from sapo_rl.config import RewardFunctionConfig
from sapo_rl.errors import UserError, did_you_mean
from sapo_rl.rewards.registry import PACKAGES, REWARD_FUNCTIONS, RewardFunction
from sapo_rl.rewards.runner.scoring import GIVEN, is_coroutine

KIND = "reward function"


def resolve(function: str) -> RewardFunction:
    """Return the reward function called `function`: a built-in's name or a dotted path `package.module.function`.

    The current directory is importable.

    Raises:
        UserError: no such built-in, module or attribute; a module that fails to import; an object that is no function.
    """
    if "." not in function:
        return REWARD_FUNCTIONS.get(function)
    found = plugins.find(KIND, function)
    if not callable(found):
        raise UserError(f"{KIND} '{function}' is a {type(found).__name__}, not a function")
    return found


def check_function(name: str, cfg: RewardFunctionConfig) -> None:
    """Refuse early what `resolve` or the first call would refuse, without importing the user's module.

    Args:
        name: key under `reward.functions`, for the message.
        cfg: the function's configuration.

    Raises:
        UserError: unknown built-in, missing package or module, a file that does not parse or never mentions the
            function, or `args` or a `concurrency` that a built-in does not take.
    """
    where = f"reward.functions.{name}"
    taken = [key for key in cfg.args if key in GIVEN]
    if taken:
        raise UserError(f"{where}.args: '{taken[0]}' is filled in at every call and cannot be set")
    if "." in cfg.function:
        try:
            plugins.check(KIND, cfg.function)
        except UserError as error:
            raise UserError(f"{where}.function: {error}") from error
        return
    if cfg.function not in REWARD_FUNCTIONS:
        hint = did_you_mean(cfg.function, REWARD_FUNCTIONS)
        raise UserError(
            f"{where}.function: unknown reward function '{cfg.function}'; {hint}\n"
            "  your own is a dotted path such as my_rewards.accuracy"
        )
    if cfg.function in PACKAGES:
        module, project = PACKAGES[cfg.function]
        if plugins.find_spec(module) is None:
            raise UserError(f"{where}.function: '{cfg.function}' needs a package: pip install {project}")
    function = REWARD_FUNCTIONS.get(cfg.function)
    check_concurrency(name, cfg, is_coroutine(function))
    _check_arguments(where, function, cfg.args)


def check_concurrency(name: str, cfg: RewardFunctionConfig, coroutine: bool) -> None:
    """Refuse several calls at once of a function that is no `coroutine` function.

    Raises:
        UserError: `cfg.concurrency` is above 1, and calls of the function are not coroutines.
    """
    if not coroutine and (cfg.concurrency or 1) > 1:
        raise UserError(
            f"reward.functions.{name}.concurrency: is {cfg.concurrency}, but '{cfg.function}' is no `async def`, and "
            "of other functions a worker makes one call at a time; leave it out, or raise reward.workers"
        )


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
        raise UserError(f"{where}.args: '{missing[0]}' is missing")
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
