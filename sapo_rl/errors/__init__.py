"""Errors by whose fault they are: the user's, or an engine's; and how they are worded."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable

WIDEST = 700
"""Characters of a line of a message; of a longer one the middle is left out."""
UNSEEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that would move a terminal's cursor or cannot be printed."""


PROGRAM = "SAPO_PROGRAM"
"""Variable with the name of the command that was typed, where it is not sapo-train; its processes inherit it."""


class UserError(Exception):
    """A mistake in a config, file, sample or environment, told in one or two lines without a traceback.

    The message names the key, file or sample, what was found there, and what would be valid. The command
    line prints it and exits with code 2. It is kept as `brief` makes it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(brief(message))


class SharedError(UserError):
    """A mistake that shows on every rank at the same moment, so that one of them can be trusted to tell it."""


def program() -> str:
    """Return the name of the command that was typed, with which its messages begin."""
    return os.environ.get(PROGRAM, "sapo-train")


def brief(message: str) -> str:
    """Return the first and the last line of `message`, the middle of long ones left out, unprintable ones escaped."""
    first, *rest = [line for line in message.split("\n") if line.strip()] or [""]
    lines = [first, *rest[-1:]]
    if len(rest) > 1:
        lines[0] += f" ... ({len(rest) - 1:,} more lines)"
    return "\n".join(_shortened(UNSEEN.sub(_escaped, line)) for line in lines)


def _shortened(line: str) -> str:
    half = WIDEST // 2
    left_out = len(line) - 2 * half
    return f"{line[:half]} ... ({left_out:,} characters) ... {line[-half:]}" if left_out > 0 else line


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


class EngineError(RuntimeError):
    """An engine failed beyond what a restart can repair; the message ends with the last lines of its log."""


class EngineLost(Exception):
    """An engine cannot be reached for now; others must answer what it leaves."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'? valid: a, b, c` for an unknown `name`; the first half only where one is near."""
    options = sorted(known)
    near = difflib.get_close_matches(name[:WIDEST], options, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}valid: {', '.join(options)}" if options else hint.strip()


def described(error: BaseException) -> str:
    """Return an error's type and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def first_line(error: BaseException | str) -> str:
    """Return the first line of an error's text; its type's name where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
