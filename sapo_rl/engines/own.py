"""An engine of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from sapo_rl import plugins
from sapo_rl.config.engine import VLLM, EngineConfig
from sapo_rl.engines.base import Engine
from sapo_rl.errors import UserError
from sapo_rl.weights.base import WeightTransport

KEY = "rollout.engine"
METHODS = ("start", "wait_ready", "submit", "recover", "score", "sleep", "close", "transport")
"""What the class must have: the methods of `Engine`, and what makes the transport of its weights."""


class EngineClass(Protocol):
    """A class of engines: called with `EngineSettings` and `rollout.engine.args`, it makes one.

    Example:
        class PlainEngine:
            def __init__(self, settings: EngineSettings, *, threads: int = 1) -> None: ...

            @staticmethod
            def transport() -> WeightTransport: ...
    """

    __call__: Callable[..., Engine]
    transport: Callable[[], WeightTransport[Any]]


def find(settings: EngineConfig) -> EngineClass | None:
    """Import the class that `settings` name, and check `args` against its parameters; None for the built-in.

    Raises:
        UserError: it cannot be imported, is no class with the methods of an engine, or does not take the arguments.
    """
    if settings.name == VLLM:
        return None
    try:
        found = plugins.find("engine", settings.name)
    except UserError as error:
        raise UserError(f"{KEY}.name: {error}") from error
    if not isinstance(found, type):
        raise UserError(f"{KEY}.name: '{settings.name}' is a {type(found).__name__}, not a class")
    missing = [name for name in METHODS if not callable(getattr(found, name, None))]
    if missing:
        raise UserError(f"{KEY}.name: '{settings.name}' has no method '{missing[0]}'; needed: {', '.join(METHODS)}")
    parameters = list(plugins.parameters_of(found).values())
    plugins.check_arguments(f"{KEY}.args", found, settings.args, parameters[1:])
    return cast(EngineClass, found)
