"""Prompts from the generators of the package reasoning-gym."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from sapo_rl.errors import UserError, did_you_mean

_TRIES = 4  # indices tried for each prompt wanted, before a dataset counts as exhausted


def create(name: str, args: dict[str, Any], size: int, seed: int) -> Any:
    """Return reasoning-gym's dataset `name` with the config `args`.

    For `composite`, `args.datasets` is a list of `{name, weight, config}`.

    Raises:
        UserError: the package is missing, or the name or the arguments are not valid.
    """
    try:
        with warnings.catch_warnings():  # a dependency of it compiles with SyntaxWarnings
            warnings.simplefilter("ignore", SyntaxWarning)
            import reasoning_gym
            from reasoning_gym.composite import DatasetSpec
            from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise UserError(f"data.source: reasoning_gym needs a package: pip install reasoning-gym ({error})") from error
    if name not in DATASETS:
        raise UserError(f"data.path: reasoning-gym has no dataset '{name}'; {did_you_mean(name, DATASETS)}")
    known = [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
    for key in args:
        if key in ("seed", "size"):
            raise UserError(f"data.args.{key}: reasoning-gym's {key} is set by {'data.size' if key == 'size' else key}")
        if key not in known:
            raise UserError(f"data.args: '{name}' of reasoning-gym takes no '{key}'; {did_you_mean(key, known)}")
    try:
        if name == "composite":
            args = {**args, "datasets": [DatasetSpec(**spec) for spec in args.get("datasets", [])]}
        return reasoning_gym.create_dataset(name, **args, size=size, seed=seed)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"data.args: '{name}' of reasoning-gym refuses {args}: {error}") from error


def generate(name: str, args: dict[str, Any], count: int, seed: int) -> list[dict[str, Any]]:
    """Return up to `count` entries with different questions, in the dataset's order.

    Rows have `prompt` and `question` (the same text), `answer`, `metadata`, and in `gym` the dataset and its arguments:
    what the reward function `reasoning_gym` needs. A dataset that repeats itself gives fewer.
    """
    dataset = create(name, args, size=count * _TRIES, seed=seed)
    rows: dict[str, dict[str, Any]] = {}
    for index in range(count * _TRIES):
        if len(rows) == count:
            break
        entry = dataset[index]
        question = entry["question"]
        rows.setdefault(
            question,
            {
                "prompt": question,
                "question": question,
                "answer": entry["answer"],
                "metadata": entry["metadata"],
                "gym": {"dataset": name, "args": args},
            },
        )
    return list(rows.values())
