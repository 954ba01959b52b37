"""How the schema's fields are declared: with choices or bounds, which `checks` holds values to."""

from __future__ import annotations

import operator
from dataclasses import field
from typing import Any

MISSING: Any = "???"
"""OmegaConf's marker for a value that the user must give."""

BOUNDS = {"above": ("above", operator.gt), "least": ("at least", operator.ge), "most": ("at most", operator.le)}
"""Kinds of bounds in a field's metadata: how they are said, and what holds of a value and the bound."""

MOST_SAMPLES = 16384
"""Completions that vLLM writes of one prompt."""

LONGEST_WAIT = 1e6
"""Seconds; the kernel's waits end at 24 days."""


def choice(default: str | None, *options: str, own: str = "", users: tuple[str, ...] = ()) -> Any:
    """A text field that admits `options` only, or also the dotted path of the user's `own`: the word for messages.

    It may be null where `default` is. `users` are the built-in losses that read it, here and in `number`; none stands
    for all.
    """
    return field(default=default, metadata={"choices": options, "own": own, "users": users})


def number(
    default: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    users: tuple[str, ...] = (),
) -> Any:
    """A number field with an open lower bound (`above`), a closed one (`least`) or a closed upper bound (`most`)."""
    return field(default=default, metadata={"above": above, "least": least, "most": most, "users": users})
