"""From the name of a reward function in the config to the function."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from sapo_rl import plugins
from sapo_rl.config import RewardFunctionConfig
from sapo_rl.config.reward import VERL, key_of
from sapo_rl.errors import UserError, did_you_mean
from sapo_rl.rewards import verl
from sapo_rl.rewards.registry import CHECKS, PACKAGES, REWARD_FUNCTIONS, VOTER, VOTERS, RewardFunction, is_coroutine
from sapo_rl.rewards.runner.scoring import GIVEN

KIND = "reward function"


def resolve(function: str) -> RewardFunction:
    """Return the reward function called `function`: a built-in's name or a dotted path `package.module.function`.

    The current directory is importable.

    Raises:
        UserError: no such built-in, module or attribute; a module that fails to import; an object that is no function.
    """
    if function.startswith(VOTER):
        return VOTERS.get(function.removeprefix(VOTER))
    if "." not in function:
        return REWARD_FUNCTIONS.get(function)
    found = plugins.find(KIND, function)
    if not callable(found):
        raise UserError(f"{KIND} '{function}' is a {type(found).__name__}, not a function")
    return found


def check_function(name: str, cfg: RewardFunctionConfig) -> None:
    """Refuse early what `resolve` or the first call would refuse, without importing the user's module.

    Args:
        name: key under `reward.functions`, or the whole key, for the message.
        cfg: the function's configuration.

    Raises:
        UserError: unknown built-in, missing package or module, a file that does not parse or never mentions the
            function, or what a built-in does not take: `args`, a `concurrency`, or settings that do not go together.
    """
    where = key_of(name)
    taken = [key for key in cfg.args if key in given_to(cfg.style)]
    if taken:
        raise UserError(f"{where}.args: '{taken[0]}' is filled in at every call and cannot be set")
    if cfg.style == VERL and cfg.scope != "sample":
        raise UserError(f"{where}.scope: is {cfg.scope}, but with style={VERL} a function sees one sample a call")
    if cfg.style == VERL and "." not in cfg.function:
        raise UserError(f"{where}.style: {VERL} is for functions of your own; '{cfg.function}' is built in")
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
    if cfg.function in CHECKS:
        CHECKS[cfg.function](name, cfg)


def given_to(style: str) -> Sequence[str]:
    """Return what a function is given at every call of this style, beside columns."""
    return verl.GIVEN if style == VERL else GIVEN


def check_concurrency(name: str, cfg: RewardFunctionConfig, coroutine: bool) -> None:
    """Refuse several calls at once of a function that is no `coroutine` function.

    Raises:
        UserError: `cfg.concurrency` is above 1, and calls of the function are not coroutines.
    """
    if not coroutine and (cfg.concurrency or 1) > 1:
        raise UserError(
            f"{key_of(name)}.concurrency: is {cfg.concurrency}, but '{cfg.function}' is no `async def`, and "
            "of other functions a worker makes one call at a time; leave it out, or raise reward.workers"
        )


def check_own_arguments(name: str, function: RewardFunction, args: Mapping[str, Any], style: str = "trl") -> None:
    """Refuse `args` that a function of the user's own would never see, or whose type its annotations exclude.

    What they leave out, columns of the data may fill in.

    Args:
        name: key under `reward.functions`, or the whole key, for the message.
        function: what `resolve` found.
        args: by name.
        style: how it is called, as in the config.

    Raises:
        UserError: naming the argument, and what is near it.
    """
    parameters = plugins.parameters_of(function).values()
    named = [
        one.replace(default=None) for one in parameters if one.kind in plugins.NAMED and one.name not in given_to(style)
    ]
    rest = [one for one in parameters if one.kind is one.VAR_KEYWORD]
    plugins.check_arguments(f"{key_of(name)}.args", function, args, [*named, *rest])


def _check_arguments(where: str, function: RewardFunction, args: dict[str, Any]) -> None:
    parameters = plugins.parameters_of(function).values()
    plugins.check_arguments(
        f"{where}.args", function, args, [one for one in parameters if one.kind is one.KEYWORD_ONLY]
    )
    empty: dict[str, list[Any]] = {one.name: [] for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD}
    try:
        found = function(**empty, **args)  # no sample: checks the settings' values only
        if inspect.iscoroutine(found):
            with contextlib.suppress(StopIteration):  # it has nothing to wait for
                found.send(None)
    except UserError as error:
        raise UserError(f"{where}.args: {error}") from error
