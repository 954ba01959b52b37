"""The table of built-in reward functions.

A reward function is `f(completions, prompts, completion_ids, **columns) -> list[Score]`, called with keywords; every
argument is a list with one entry a sample. `columns` are the dataset's columns, the answer under `answer`.
Built-ins take their settings (`args` in the config) as keyword-only parameters, columns as plain ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import Any, TypeAlias

from sapo_rl.config import RewardFunctionConfig
from sapo_rl.plugins import Registry

RewardFunction: TypeAlias = Callable[..., Any]
"""Returns `list[Score]`, or a coroutine of it."""

Score: TypeAlias = float | dict[str, float | None] | None
"""A sample's reward, None where the function does not apply to it; or that under `score`, with further numbers, which
are recorded beside it."""

Completion: TypeAlias = str | list[dict[str, str]]
"""Text, or one assistant message in a list where the prompt is a chat."""

REWARD_FUNCTIONS: Registry[RewardFunction] = Registry("reward function")
"""Built-in reward functions by the name that `reward.functions.<name>.function` takes."""

VOTERS: Registry[RewardFunction] = Registry("voter")
"""For built-ins whose replies can be compared, by their name: a function of the same arguments that numbers a prompt's
replies by their answer, from 1; the same number for equal answers, 0 for a reply without one."""

VOTER = "votes of "
"""Begins the name under which a voter is called like a reward function."""

PACKAGES = {
    "math_verify": ("math_verify", "math-verify"),
    "reasoning_gym": ("reasoning_gym", "reasoning-gym"),
}
"""Built-ins that need a further package: its module and its name on PyPI."""

SLOW = ("code", "reward_model")
"""Built-ins of which each sample takes time: a call may take as long as the limit of one says, times their number."""

PREPARATIONS: dict[str, Callable[..., None]] = {}
"""What takes long before the first call of a built-in, or may be missing in its process, by its name: called once in a
worker, with the settings."""

COLUMNS: dict[str, Callable[..., list[str]]] = {}
"""Columns that a built-in reads because its settings name them, by its name: called with the settings."""

CHECKS: dict[str, Callable[[str, RewardFunctionConfig], None]] = {}
"""What raises UserError for a built-in's config whose parts do not go together, by its name: called with the key under
`reward.functions` and the config, whose `args` are right by themselves."""


AT_ONCE: dict[str, Callable[..., int]] = {}
"""How many calls of a built-in coroutine may be under way at once, by its name, where it is not `USUALLY_AT_ONCE`:
called with the settings."""

USUALLY_AT_ONCE = 64
"""Calls of a coroutine function that a worker has under way at once, where the config does not say."""


def calls_at_once(cfg: RewardFunctionConfig) -> int:
    """Return how many calls of a coroutine function a worker may have under way."""
    return cfg.concurrency or AT_ONCE.get(cfg.function, lambda **_: USUALLY_AT_ONCE)(**cfg.args)


def is_coroutine(function: RewardFunction) -> bool:
    """Return whether calls of `function` are coroutines, so that many can be under way at once."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def voter_of(cfg: RewardFunctionConfig) -> RewardFunctionConfig | None:
    """Return what compares the replies of a prompt as a function judges them; None where there is nothing for it."""
    if cfg.function not in VOTERS:
        return None
    return replace(cfg, function=VOTER + cfg.function, scope="group", timeout=10 * cfg.timeout, on_error="zero")


def numbered(answers: Iterable[Hashable | None]) -> list[float]:
    """Return the answers' numbers in the order of their first appearance, from 1; 0 for None."""
    numbers: dict[Hashable, float] = {}
    return [0.0 if answer is None else numbers.setdefault(answer, len(numbers) + 1.0) for answer in answers]
