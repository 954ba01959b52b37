"""A sweep (`-m`): which of its runs this is, what it alone sets, and the table at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from sapo_rl.errors import UserError


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    number: int
    """From 1."""
    total: int
    """Runs of the sweep; 0 where its sweeper decides that as it goes."""
    own: dict[str, str]
    """What it sets of the keys that are swept over; a recipe as the user named it."""
    sweep: str
    """What its runs have in common: a name by the time at which it began."""

    @property
    def title(self) -> str:
        """What is printed before the run."""
        count = f"{self.number}/{self.total}" if self.total else str(self.number)
        return " ".join([f"[{count}]", *(f"{key}={value}" for key, value in self.own.items())])


@dataclass(frozen=True)
class Result:
    """How a run of a sweep ended."""

    job: Job
    folder: Path | None
    """None where it was refused before it had one."""
    code: int


def this_job(settings: Any, argv: Sequence[str], files: dict[str, Path]) -> Job | None:
    """Return the run that Hydra has composed, or None where there is no sweep.

    Args:
        settings: Hydra's own config for the run.
        argv: the arguments that Hydra got.
        files: the user's own files by recipe name.
    """
    if settings.mode != RunMode.MULTIRUN:
        return None
    overrides = get_args_parser().parse_args(list(argv)).overrides
    fixed = [f"{key}={value}" for key, value in (settings.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    swept = {
        override.get_key_element().lstrip("+~"): override
        for override in parser.parse_overrides([*fixed, *overrides])
        if override.is_sweep_override()
    }
    pairs = [one.partition("=") for one in settings.overrides.task]
    own = {name: value for key, _, value in pairs if (name := key.lstrip("+~")) in swept}
    if own.get("config") in files:
        own["config"] = str(files[own["config"]])
    countable = settings.sweeper._target_.endswith(".BasicSweeper")
    total = math.prod(len(list(one.sweep_string_iterator())) for one in swept.values()) if countable else 0
    return Job(settings.job.num + 1, total, own, f"sweep {Path(settings.sweep.dir).name}")


def own_arguments(typed: Sequence[str], job: Job) -> list[str]:
    """Return the arguments that start this run of the sweep alone."""
    left = dict(job.own)
    found = []
    for argument in typed:
        key = argument.partition("=")[0]
        if (name := key.lstrip("+~")) in left:
            found.append(f"{key}={left.pop(name)}")
        elif argument not in ("-m", "--multirun"):
            found.append(argument)
    return [*found, *(f"{key}={value}" for key, value in left.items())]


def show(results: Sequence[Result]) -> None:
    """Print a row for each run: what it set, its last and best evaluation, how long it took, and where it lies."""
    from rich.table import Table
    from rich.text import Text

    from sapo_rl.telemetry.report.table import show

    keys = list(dict.fromkeys(key for result in results for key in result.job.own))
    found = Table("", *keys, "eval reward, last", "best", "time", "", box=None, padding=(0, 2, 0, 0))
    for result in results:
        where = [str(result.folder)] if result.folder else []
        where += [f"exit code {result.code}"] if result.code else []
        own = [Text(result.job.own.get(key, "-")) for key in keys]
        found.add_row(str(result.job.number), *own, *_outcome(result.folder), Text(", ".join(where)))
    show(found)


def _outcome(folder: Path | None) -> tuple[str, str, str]:
    from sapo_rl.telemetry.progress import duration, short
    from sapo_rl.telemetry.report.runs import load

    try:
        if folder is None:
            return "-", "-", "-"
        run = load(folder)
    except UserError:  # it ended before its first number
        return "-", "-", "-"
    seconds = max(record["time"] for record in [*run.steps, *run.evals])
    scores = run.eval_rewards
    return (short(scores[-1]), short(max(scores)), duration(seconds)) if scores else ("-", "-", duration(seconds))
