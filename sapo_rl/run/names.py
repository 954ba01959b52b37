"""What a run is called in trackers: its recipe, what was set beside it, and the name of its folder."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable

from sapo_rl.run_folder.secrets import redact_override

ASIDE = ("check", "checkpoint", "config", "dry_run", "hydra", "launch", "logging", "resume", "run_dir")
"""Keys and sections that change nothing about what is learnt, and the recipe, which stands first."""
LONGEST = 100
"""Characters of what was set; W&B takes 128 of a name."""


def run_name(recipe: str, settings: Iterable[str], folder: str) -> str:
    """Return a run's name.

    Args:
        recipe: its name.
        settings: the `key=value` arguments that tell it from others: those of the command line, or in a sweep those
            that are swept over.
        folder: the name of its folder.

    Example:
        >>> run_name("quickstart", ["config=quickstart", "loss.tau_neg=1.05", "launch=ddp"], "2026-11-23_04-09-45")
        'quickstart tau_neg=1.05 2026-11-23_04-09-45'
    """
    told = [
        f"{shortest(key)}={value}"
        for key, _, value in (redact_override(one.lstrip("+~")).partition("=") for one in settings if matters(one))
        if key not in ("fork", "step")
    ]
    text = " ".join(told)
    return " ".join(filter(None, [recipe, text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…", folder]))


def matters(argument: str) -> bool:
    """Whether an argument `key=value` tells a run from others of its recipe; flags do not."""
    key, equals, _ = argument.lstrip("+~").partition("=")
    return bool(equals) and key.partition("/")[0].partition(".")[0] not in ASIDE


def shortest(key: str) -> str:
    """Return the end of a dotted key that no other key has: `tau_neg` of `loss.tau_neg`, but `eval.every`."""
    parts = key.split(".")
    ends = (".".join(parts[place:]) for place in range(len(parts) - 1, -1, -1))
    return next((end for end in ends if _ends()[end] == 1), key)


@functools.cache
def _ends() -> Counter[str]:
    """How many keys end like this."""
    from sapo_rl.run.keys import every_key

    found = Counter[str]()
    for key in every_key():
        parts = key.name.split(".")
        found.update(".".join(parts[place:]) for place in range(len(parts)))
    return found
