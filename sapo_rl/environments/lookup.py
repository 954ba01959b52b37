"""From the names in the config to environments and tools."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from sapo_rl import plugins
from sapo_rl.config import ENVIRONMENT, Config, EnvironmentConfig
from sapo_rl.environments import endpoint
from sapo_rl.environments.base import Kind
from sapo_rl.environments.registry import ENVIRONMENTS
from sapo_rl.errors import UserError, did_you_mean

KIND = "environment"


def check_environment(cfg: EnvironmentConfig, key: str = "environment") -> None:
    """Refuse early what `build` would refuse, without importing the user's module.

    `key` is where it stands in the config, for messages.

    Raises:
        UserError: an unknown built-in, missing module, a file that does not parse or never mentions the class, or
            `args` that a built-in does not take.
    """
    name = cfg.name
    if name is None:
        return
    if "." in name:
        plugins.check(KIND, name)
    elif name in ENVIRONMENTS:
        _check_arguments(ENVIRONMENTS.get(name), cfg.args, key)
        if name == endpoint.AGENT:
            plugins.check(endpoint.KIND, cfg.args["run"])
    else:
        hint = did_you_mean(name, ENVIRONMENTS)
        raise UserError(
            f"{key}.name: unknown environment '{name}'; {hint}\n  your own is a dotted path such as my_games.Wordle"
        )


def check_tool(path: str) -> None:
    """Refuse early what `build` would refuse of a tool. Raises UserError."""
    if "." not in path:
        raise UserError(f"'{path}' is no dotted path; a tool is a function of yours: my_tools.search")
    plugins.check("tool", path)


def environment_for(config: Config, row: Mapping[str, Any], number: int) -> str:
    """Return which of `config.played` row `number` of the data asks for.

    Raises:
        UserError: it has no column `environment`, or names none of those that there are.
    """
    if not config.environments:
        return ""
    if ENVIRONMENT not in row:
        raise UserError(
            f"environments: the data has no column '{ENVIRONMENT}', which says which of them a row is for; "
            f"{did_you_mean(ENVIRONMENT, row)}"
        )
    name = row[ENVIRONMENT]
    if not isinstance(name, str) or name not in config.environments:
        found = "missing" if name is None else repr(name)[:80]
        raise UserError(
            f"row {number}: '{ENVIRONMENT}' is {found}, must be a key of environments; "
            f"{did_you_mean(str(name), config.environments)}"
        )
    return name


def build(name: str | None, args: dict[str, Any], tools: list[str], key: str) -> Kind:
    """Import an environment and tools; `key` is where it stands in the config.

    Raises:
        UserError: there is no such thing, it does not suit `args`, or is of neither shape.
    """
    functions: list[Callable[..., Any]] = []
    for path in tools:
        function = plugins.find("tool", path)
        if not callable(function) or isinstance(function, type):
            raise UserError(f"tool '{path}' is a {type(function).__name__}, not a function")
        functions.append(function)
    if name is None:
        return Kind(None, None, {}, functions)
    found = plugins.find(KIND, name) if "." in name else ENVIRONMENTS.get(name)
    if not callable(found):
        raise UserError(f"environment '{name}' is a {type(found).__name__}, not a class or a function that makes one")
    _check_arguments(found, args, key)
    try:
        return Kind(name, found, args, functions)
    except UserError as error:  # of an adapter, which does not know where its arguments stand
        raise UserError(re.sub(r"^environment\.args", f"{key}.args", str(error))) from error


def _check_arguments(target: Callable[..., Any], args: dict[str, Any], key: str) -> None:
    parameters = plugins.parameters_of(target).values()
    plugins.check_arguments(
        f"{key}.args", target, args, [one for one in parameters if one.kind is not one.POSITIONAL_ONLY]
    )
