"""One call of a reward function: its keyword arguments, its result checked, its failure put into words."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Mapping, Set
from types import CodeType
from typing import Any

from sapo_rl.errors.own_code import line_of, told
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
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have none
        return []
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty]
    return [p.name for p in named if p.name not in GIVEN and p.name not in settings]


def evaluate(function: RewardFunction, arguments: dict[str, list[Any]], settings: dict[str, Any]) -> list[float | None]:
    """Call `function` and return one float or None for each completion in `arguments`.

    A function without `**kwargs` gets those arguments alone that it names. A coroutine is run to its end.

    Raises:
        ScoreError: the function raised, or its result is not a list of finite numbers and None of the right length.
    """
    expected = len(arguments["completions"])  # now: the function may change the lists that it is given
    try:
        result = function(**_accepted(function, {**arguments, **settings}))
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
    except ScoreError:  # of a function that has another one called
        raise
    except BaseException as error:
        raise ScoreError(f"{told(error)}{_line(function, error)}") from error
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
        result = await function(**_accepted(function, {**arguments, **settings}))
    except ScoreError:
        raise
    except BaseException as error:
        raise ScoreError(f"{told(error)}{_line(function, error)}") from error
    return _checked(result, expected, function)


def is_coroutine(function: RewardFunction) -> bool:
    """Return whether calls of `function` are coroutines, so that many can be under way at once."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _checked(result: Any, expected: int, function: RewardFunction) -> list[float | None]:
    if isinstance(result, str | bytes | bytearray | Mapping | Set) or not hasattr(result, "__iter__"):
        raise ScoreError(f"returned a {type(result).__name__}, must be a list of {expected}{_line(function)}")
    try:
        values = list(result)
    except BaseException as error:  # such as a tensor without dimensions
        raise ScoreError(f"returned a {type(result).__name__}: {told(error)}{_line(function)}") from error
    if len(values) != expected:
        raise ScoreError(f"returned {len(values)} values for {expected} completions{_line(function)}")
    return [_number(value, function) for value in values]


def _accepted(function: RewardFunction, keywords: dict[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some callables written in C have none
        return keywords
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return keywords
    return {name: value for name, value in keywords.items() if name in parameters}


def _number(value: Any, function: RewardFunction) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except BaseException:  # its own `__float__` may raise anything
        number = math.nan
    if not abs(number) <= LARGEST_REWARD:
        try:
            shown = repr(value)[:60]
        except BaseException as error:
            shown = f"a {type(value).__name__} (its __repr__: {told(error)})"
        raise ScoreError(
            f"returned {shown} for a sample, must be a finite number of at most {LARGEST_REWARD:g} or None"
            f"{_line(function)}"
        )
    return number


def _line(function: RewardFunction, error: BaseException | None = None) -> str:
    """Where the function raised, or where it is defined."""
    return line_of(_code(function), error)


def _code(function: RewardFunction) -> CodeType | None:
    plain = inspect.unwrap(function)
    return getattr(plain, "__code__", getattr(type(plain).__call__, "__code__", None))
