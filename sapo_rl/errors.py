"""The one exception that means: the user can mend this."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a config, file, sample or environment, told in one or two lines without a traceback.

    The message names the key, file or sample, what was found there, and what would be valid. The command
    line prints it and exits with code 2.
    """


class SharedError(UserError):
    """A mistake that shows on every rank at the same moment, so that one of them can be trusted to tell it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'? valid: a, b, c` for an unknown `name`; the first half only where one is near."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}valid: {', '.join(options)}" if options else hint.strip()
