"""What a user's own code raises, in words fit for a terminal."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Mapping
from typing import Any, TypeGuard

LONGEST_FAILURE = 10_000
"""Characters of a failure's text that a worker answers; what is shown of it is shortened further."""

MOST_CHARACTERS = 1000
"""Of a failure's text, in what is shown and kept."""

MOST_LINES = 12
"""The same in lines."""


def told(error: BaseException) -> str:
    """Return the kind of an error and its text."""
    try:
        text = str(error)
    except BaseException as other:
        text = f"its __str__ raises {type(other).__name__}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def line_of(function: Any, error: BaseException | None = None) -> str:
    """Return ` (file:line)` of the innermost frame in the file of `function`; of its definition where there is none.

    `function` may be anything that is called; nothing is returned where neither place is known.
    """
    plain = inspect.unwrap(function) if callable(function) else None
    code = getattr(plain, "__code__", getattr(type(plain).__call__, "__code__", None)) if plain is not None else None
    frames = traceback.extract_tb(error.__traceback__)[1:] if error is not None else []  # the first frame is ours
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    place = next(reversed(own or frames), None)
    if place is not None:
        return f" ({place.filename}:{place.lineno})"
    return "" if code is None else f" ({code.co_filename}:{code.co_firstlineno})"


def number_of(found: Any, most: float) -> float | None:
    """Return `found` as a number; None for text, and for what is no number, not finite or beyond `most` either way."""
    try:
        number = math.nan if isinstance(found, str | bytes) else float(found)
    except BaseException:  # its own `__float__` may raise anything
        return None
    return number if abs(number) <= most else None


def shown(found: Any) -> str:
    """Return how an object shows itself, cut where it is long, with the name of its type."""
    try:
        text = repr(found)
    except BaseException as error:
        return f"a {type(found).__name__} (its __repr__: {told(error)})"
    return text if len(text) <= 80 else f"{text[:60]}... ({type(found).__name__})"


def shorten(text: str, most: int) -> str:
    """Return `text`, or its beginning and its end where it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-(most // 2) :]}"


def readable(text: str) -> str:
    """Return `text` fit for a terminal: shortened in the middle, without what is not to be printed."""
    lines = shorten(text, MOST_CHARACTERS).split("\n")
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES // 2], "[...]", *lines[-(MOST_LINES // 2) :]]
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1]
        for character in "\n".join(lines)
    )


def is_list(found: object) -> TypeGuard[list[Any]]:
    """Return whether it is a list of anything: after `isinstance` alone a type checker knows nothing of its items."""
    return isinstance(found, list)


def is_tuple(found: object) -> TypeGuard[tuple[Any, ...]]:
    """Return whether it is a tuple of anything."""
    return isinstance(found, tuple)


def is_dict(found: object) -> TypeGuard[dict[Any, Any]]:
    """Return whether it is a dictionary of anything."""
    return isinstance(found, dict)


def is_mapping(found: object) -> TypeGuard[Mapping[Any, Any]]:
    """Return whether it is a mapping of anything."""
    return isinstance(found, Mapping)
