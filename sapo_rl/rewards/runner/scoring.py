"""One call of a reward function: its keyword arguments, its result checked, its failure put into words."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Set
from typing import Any

from sapo_rl.errors.own_code import line_of, number_of, shown, told
from sapo_rl.plugins import NAMED, accepted, parameters_of
from sapo_rl.rewards.registry import RewardFunction
from sapo_rl.types import LARGEST_REWARD, Group, Sample

GIVEN = ("completions", "prompts", "completion_ids")
"""What every call is given beside the data's columns and the function's settings."""


class ScoreError(Exception):
    """A call that gave no usable scores; the message is the cause, with file and line where they are known."""


def call_arguments(group: Group, chosen: list[int]) -> dict[str, list[Any]]:
    """Return the keyword arguments for the samples `chosen` of a group, as TRL passes them.

    `prompts`, `completions`, `completion_ids` and every column of the prompt, each with `len(chosen)` entries. A chat
    prompt's completion is a list of one assistant message, a text prompt's a string; that of an episode with several
    turns is all that was said after the prompt, as messages.
    """
    samples = [group.samples[position] for position in chosen]
    chat = not isinstance(group.prompt.content, str)
    columns = {name: [value] * len(samples) for name, value in group.prompt.columns.items()}
    return {
        **columns,
        "prompts": [group.prompt.content] * len(samples),
        "completions": [_completion(sample, chat) for sample in samples],
        "completion_ids": [s.token_ids for s in samples],
    }


def _completion(sample: Sample, chat: bool) -> str | list[dict[str, Any]]:
    if sample.messages is not None:
        return sample.messages
    return [{"role": "assistant", "content": sample.text}] if chat else sample.text


def needed_columns(function: RewardFunction, settings: dict[str, Any]) -> list[str]:
    """Return the columns without which `function` cannot be called."""
    named = [p for p in parameters_of(function).values() if p.kind in NAMED and p.default is p.empty]
    return [p.name for p in named if p.name not in GIVEN and p.name not in settings]


def evaluate(function: RewardFunction, arguments: dict[str, list[Any]], settings: dict[str, Any]) -> list[float | None]:
    """Call `function` and return one float or None for each completion in `arguments`.

    A function without `**kwargs` gets those arguments alone that it names. A coroutine is run to its end.

    Raises:
        ScoreError: the function raised, or its result is not a list of finite numbers and None of the right length.
    """
    expected = len(arguments["completions"])  # now: the function may change the lists that it is given
    try:
        result = function(**accepted(function, {**arguments, **settings}))
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
    except ScoreError:  # of a function that has another one called
        raise
    except BaseException as error:
        raise ScoreError(f"{told(error)}{line_of(function, error)}") from error
    return _checked(result, expected, function)


async def evaluate_coroutine(
    function: RewardFunction, arguments: dict[str, list[Any]], settings: dict[str, Any]
) -> list[float | None]:
    """Await a call of a coroutine function, as `evaluate` makes one; a cancelled call fails too.

    Raises:
        ScoreError: as `evaluate`.
    """
    expected = len(arguments["completions"])
    try:
        result = await function(**accepted(function, {**arguments, **settings}))
    except ScoreError:
        raise
    except BaseException as error:
        raise ScoreError(f"{told(error)}{line_of(function, error)}") from error
    return _checked(result, expected, function)


def is_coroutine(function: RewardFunction) -> bool:
    """Return whether calls of `function` are coroutines, so that many can be under way at once."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _checked(result: Any, expected: int, function: RewardFunction) -> list[float | None]:
    if isinstance(result, str | bytes | bytearray | Mapping | Set) or not hasattr(result, "__iter__"):
        raise ScoreError(f"returned a {type(result).__name__}, must be a list of {expected}{line_of(function)}")
    try:
        values = list(result)
    except BaseException as error:  # such as a tensor without dimensions
        raise ScoreError(f"returned a {type(result).__name__}: {told(error)}{line_of(function)}") from error
    if len(values) != expected:
        raise ScoreError(f"returned {len(values)} values for {expected} completions{line_of(function)}")
    return [_number(value, function) for value in values]


def _number(value: Any, function: RewardFunction) -> float | None:
    number = None if value is None else number_of(value, LARGEST_REWARD)
    if value is not None and number is None:
        raise ScoreError(
            f"returned {shown(value)} for a sample, must be a finite number of at most {LARGEST_REWARD:g} or None"
            f"{line_of(function)}"
        )
    return number
