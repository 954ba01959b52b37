"""Reward functions as verl has them, `compute_score(data_source, solution_str, ground_truth, extra_info)`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from sapo_rl.rewards.registry import Completion, RewardFunction, is_coroutine
from sapo_rl.rewards.text import text_of
from sapo_rl.rewards.waiting import all_of

GIVEN = ("data_source", "solution_str", "ground_truth", "extra_info")
"""What every call is given beside the function's settings."""


def with_lists(function: RewardFunction, settings: Mapping[str, Any]) -> RewardFunction:
    """Return a reward function that calls one of verl's once for each sample.

    It takes the columns `data_source` and `extra_info`, as verl's data has them, where they are there. Coroutines are
    awaited side by side; where one raises the others are cancelled.

    Args:
        function: returns a number, or a dictionary with one under `score` and further ones beside it.
        settings: keyword arguments that it gets at every call.

    Example:
        >>> def compute_score(data_source, solution_str, ground_truth, extra_info):
        ...     return {"score": 1.0 if solution_str == ground_truth else -1.0, "acc": solution_str == ground_truth}
        >>> with_lists(compute_score, {})(["7", "8"], ["7", "7"])
        [{'score': 1.0, 'acc': True}, {'score': -1.0, 'acc': False}]
    """

    async def awaited(*args: Any, **columns: Any) -> list[Any]:
        return await all_of([function(**one) for one in _calls(settings, *args, **columns)])

    def called(*args: Any, **columns: Any) -> list[Any]:
        return [function(**one) for one in _calls(settings, *args, **columns)]

    # Under the user's name, for where a failure is told; with the parameters of our own, for what it is given.
    made = functools.wraps(function)(awaited if is_coroutine(function) else called)
    parameters = list(inspect.signature(_calls).parameters.values())[1:]
    setattr(made, "__signature__", inspect.Signature(parameters))  # noqa: B010
    return made


def _calls(
    settings: Mapping[str, Any],
    completions: list[Completion],
    answer: list[Any],
    data_source: list[str] | None = None,
    extra_info: list[dict[str, Any] | None] | None = None,
) -> Iterator[dict[str, Any]]:
    """The keyword arguments of verl for each sample."""
    nothing = [None] * len(completions)
    for completion, truth, source, extra in zip(
        completions, answer, data_source or nothing, extra_info or nothing, strict=True
    ):
        yield {
            "data_source": source,
            "solution_str": text_of(completion),
            "ground_truth": truth,
            "extra_info": extra or {},
            **settings,
        }
