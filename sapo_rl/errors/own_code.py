"""What a user's own code raises, in words fit for a terminal."""

from __future__ import annotations

import traceback
from types import CodeType

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


def line_of(code: CodeType | None, error: BaseException | None = None) -> str:
    """Return ` (file:line)` of the innermost frame in the file of `code`; of its definition where there is none."""
    frames = traceback.extract_tb(error.__traceback__)[1:] if error is not None else []  # the first frame is ours
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    place = next(reversed(own or frames), None)
    if place is not None:
        return f" ({place.filename}:{place.lineno})"
    return "" if code is None else f" ({code.co_filename}:{code.co_firstlineno})"


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
