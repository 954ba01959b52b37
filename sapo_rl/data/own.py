"""Rows from a function of the user's own."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, cast

from sapo_rl import plugins
from sapo_rl.config import DataConfig
from sapo_rl.errors import UserError, described

KIND = "data source"
SPLIT = "split"
"""The parameter by which a function is told which rows are wanted."""

Source: TypeAlias = Callable[..., Iterable[Mapping[str, Any]]]


def is_own(source: str) -> bool:
    """Return whether `data.source` is a dotted path."""
    return "." in source


def find(cfg: DataConfig) -> Source:
    """Import the function that `data.source` names, and check `data.args` against its parameters.

    Raises:
        UserError: it cannot be imported, is no function, or does not take the arguments.
    """
    found = plugins.find(KIND, cfg.source)
    if not callable(found):
        raise UserError(f"data.source: '{cfg.source}' is a {type(found).__name__}, not a function")
    function = cast(Source, found)
    parameters = plugins.parameters_of(function)
    settings = [one for name, one in parameters.items() if name != SPLIT]
    plugins.check_arguments("data.args", function, cfg.args, settings)
    if cfg.eval_split is not None and SPLIT not in parameters:
        raise UserError(
            f"data.eval_split: '{cfg.source}' has no parameter '{SPLIT}' to be told by; give it one, or leave "
            "eval_split out to hold out some of its rows"
        )
    return function


def read(cfg: DataConfig, split: str) -> list[dict[str, Any]]:
    """Call the function for the rows of a split.

    Raises:
        UserError: as `find`, or the function raised, or returned anything but mappings.
    """
    function = find(cfg)
    named = {SPLIT: split} if SPLIT in plugins.parameters_of(function) else {}
    try:
        rows = list(function(**named, **cfg.args))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"data.source: '{cfg.source}' failed: {described(error)} ({place.filename}:{place.lineno})"
        ) from error
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(
                f"data.source: row {number} of '{cfg.source}' is a {type(row).__name__}, must be a mapping of columns "
                "to values"
            )
    return [dict(row) for row in rows]
