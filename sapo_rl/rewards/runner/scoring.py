"""One call of a reward function: its keyword arguments, its result checked, its failure put into words."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence, Set
from typing import Any

from sapo_rl.errors.own_code import line_of, number_of, shown, told
from sapo_rl.plugins import NAMED, accepted, parameters_of
from sapo_rl.rewards.registry import RewardFunction, Score
from sapo_rl.rewards.runner.sheet import Place
from sapo_rl.types import LARGEST_REWARD

ENVIRONMENTS = "environments"
"""The argument by which a function sees the environments that were played, as in TRL."""
GIVEN = ("completions", "prompts", "completion_ids", ENVIRONMENTS)
"""What every call is given beside the data's columns and the function's settings."""


class EnvironmentState:
    """The public attributes of an environment at the end of its episode.

    Example:
        >>> EnvironmentState({"reward": 0.5}).reward
        0.5
    """

    def __init__(self, attributes: Mapping[str, Any]) -> None:
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"no '{name}' of the environment is kept: public attributes are, where JSON can hold them in 64 KiB"
        )


class ScoreError(Exception):
    """A call that gave no usable scores; the message is the cause, with file and line where they are known."""


def call_arguments(places: Sequence[Place]) -> dict[str, list[Any]]:
    """Return the keyword arguments for some samples, as TRL passes them.

    `prompts`, `completions`, `completion_ids` and every column of the prompts, each with an entry a sample. A chat
    prompt's completion is a list of one assistant message, a text prompt's a string; that of an episode with several
    turns is all that was said after the prompt, as messages. `environments` are the states of those that
    were played, where they are kept.
    """
    prompts = [place.prompt for place in places]
    states = [place.sample.info.get("state") for place in places]
    return {
        **{name: [prompt.columns[name] for prompt in prompts] for name in prompts[0].columns},
        "prompts": [prompt.content for prompt in prompts],
        "completions": [_completion(place) for place in places],
        "completion_ids": [place.sample.token_ids for place in places],
        **({ENVIRONMENTS: states} if any(state is not None for state in states) else {}),
    }


def _completion(place: Place) -> str | list[dict[str, Any]]:
    text, messages = place.sample.text, place.sample.messages
    if messages is not None:
        return messages
    return text if isinstance(place.prompt.content, str) else [{"role": "assistant", "content": text}]


def needed_columns(function: RewardFunction, settings: dict[str, Any]) -> list[str]:
    """Return the columns without which `function` cannot be called, and `ENVIRONMENTS` where it names that."""
    named = [p for p in parameters_of(function).values() if p.kind in NAMED]
    columns = [p.name for p in named if p.default is p.empty and p.name not in GIVEN and p.name not in settings]
    return columns + [p.name for p in named if p.name == ENVIRONMENTS]


def evaluate(function: RewardFunction, arguments: dict[str, list[Any]], settings: dict[str, Any]) -> list[Score]:
    """Call `function` and return one score for each completion in `arguments`.

    A function without `**kwargs` gets those arguments alone that it names. A coroutine is run to its end.

    Raises:
        ScoreError: the function raised, or its result is not a list of scores of the right length.
    """
    expected = len(arguments["completions"])  # now: the function may change the lists that it is given
    try:
        result = function(**_given(function, arguments, settings))
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
    except ScoreError:  # of a function that has another one called
        raise
    except BaseException as error:
        raise ScoreError(f"{told(error)}{line_of(function, error)}") from error
    return _checked(result, expected, function)


async def evaluate_coroutine(
    function: RewardFunction, arguments: dict[str, list[Any]], settings: dict[str, Any]
) -> list[Score]:
    """Await a call of a coroutine function, as `evaluate` makes one; a cancelled call fails too.

    Raises:
        ScoreError: as `evaluate`.
    """
    expected = len(arguments["completions"])
    try:
        result = await function(**_given(function, arguments, settings))
    except ScoreError:
        raise
    except BaseException as error:
        raise ScoreError(f"{told(error)}{line_of(function, error)}") from error
    return _checked(result, expected, function)


def _given(
    function: RewardFunction, arguments: dict[str, list[Any]], settings: dict[str, Any]
) -> dict[str, list[Any] | Any]:
    """What a function is called with: what it names; with `**kwargs` all, environments where they are kept."""
    states = arguments.get(ENVIRONMENTS) or [None] * len(arguments["completions"])
    seen = {ENVIRONMENTS: [None if state is None else EnvironmentState(state) for state in states]}
    asked = ENVIRONMENTS in arguments or ENVIRONMENTS in parameters_of(function)
    return accepted(function, {**arguments, **settings, **(seen if asked else {})})


def _checked(result: Any, expected: int, function: RewardFunction) -> list[Score]:
    if isinstance(result, str | bytes | bytearray | Mapping | Set) or not hasattr(result, "__iter__"):
        raise ScoreError(f"returned a {type(result).__name__}, must be a list of {expected}{line_of(function)}")
    try:
        values = list(result)
    except BaseException as error:  # such as a tensor without dimensions
        raise ScoreError(f"returned a {type(result).__name__}: {told(error)}{line_of(function)}") from error
    if len(values) != expected:
        raise ScoreError(f"returned {len(values)} values for {expected} completions{line_of(function)}")
    return [_score(value, function) for value in values]


def _score(value: Any, function: RewardFunction) -> Score:
    if not isinstance(value, Mapping):
        return _number(value, function)
    if "score" not in value:
        raise ScoreError(f"returned {shown(value)} for a sample, which lacks the key 'score'{line_of(function)}")
    others = {str(key): number_of(one, LARGEST_REWARD) for key, one in value.items() if key != "score"}
    numbers = {key: number for key, number in others.items() if number is not None}  # texts have no place in metrics
    return {"score": _number(value["score"], function), **numbers}


def _number(value: Any, function: RewardFunction) -> float | None:
    number = None if value is None else number_of(value, LARGEST_REWARD)
    if value is not None and number is None:
        raise ScoreError(
            f"returned {shown(value)} for a sample, must be a finite number of at most {LARGEST_REWARD:g} or None"
            f"{line_of(function)}"
        )
    return number
