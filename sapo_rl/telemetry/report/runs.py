"""Runs out of their folders, and what tells them apart."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from sapo_rl.config.nested import leaves
from sapo_rl.errors import UserError
from sapo_rl.run_folder import CONFIG, METRICS, record
from sapo_rl.telemetry.metrics import read_metrics
from sapo_rl.telemetry.progress import Progress, Record, one_line, phases

OWN_KEYS = ("description", "resume", "dry_run", "check", "run_dir")
"""Keys that say nothing about how two runs differ, as those of `logging` do."""
SEED = "seed"


def unlinked(folders: Iterable[Path]) -> list[Path]:
    """Return each run once: `latest` is a link to a run that `runs/mine/*` names as well."""
    found: dict[Path, Path] = {}
    for folder in folders:
        found.setdefault(folder.resolve(), folder)
    return list(found.values())


def load_all(folders: Sequence[Path], tell: Callable[[str], object]) -> list[Progress]:
    """Load the runs, those of a sweep beside each other; of several, those without numbers are told of and left out.

    Raises:
        UserError: as `load`, where no run is left.
    """
    runs = []
    for folder in folders:
        try:
            runs.append(load(folder))
        except UserError as error:
            if folder == folders[-1] and not runs:
                raise
            tell(f"left out: {error}")
    return _together(runs)


def sweep_of(run: Progress) -> str:
    """Return the name of the sweep that a run is one of; empty where it is none."""
    with suppress(UserError):  # what cannot be read says nothing
        found = record.read(run.folder)
        return str(found.get(record.SWEEP) or "") if isinstance(found, dict) else ""
    return ""


def _together(runs: Sequence[Progress]) -> list[Progress]:
    """The runs of a sweep where the first of them is, in the order of their numbers; all others as they are."""
    sweeps = [sweep_of(run) for run in runs]
    first = {sweep: place for place, sweep in reversed([*enumerate(sweeps)]) if sweep}

    def order(place: int) -> tuple[int, list[tuple[int, str]]]:
        if not sweeps[place]:
            return place, []
        parts = re.findall(r"(\d+)|(\D+)", str(runs[place].folder))
        return first[sweeps[place]], [(int(number or -1), text) for number, text in parts]

    return [runs[place] for place in sorted(range(len(runs)), key=order)]


def load(folder: Path) -> Progress:
    """Read a run's records, those of all its steps.

    Raises:
        UserError: the folder has no metrics, or they hold no step and no evaluation.
    """
    records = read_metrics(folder / METRICS)
    run = Progress(folder, total=max((one["step"] for one in records), default=0), steps=deque())
    for one in records:
        run.add(one)
    if not run.steps and not run.evals:
        raise UserError(f"{folder / METRICS} holds no step and no evaluation yet")
    return run


def labels(runs: Sequence[Progress]) -> list[str]:
    """Return a short name for each run: the folder's, with as many of its parents as tell the runs apart."""
    paths = [run.folder.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]


def settings(run: Progress) -> dict[str, Any]:
    """Return the run's config by dotted key; empty where it has none.

    Raises:
        UserError: it cannot be read.
    """
    path = run.folder / CONFIG
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"'{path}' cannot be read: {one_line(str(error), 200)}") from error
    return dict(leaves(found)) if isinstance(found, dict) else {}


def differences(runs: Sequence[Progress]) -> dict[str, list[str]]:
    """Return the settings that differ between the runs, by key: a text for each run, `-` where it has no such key."""
    configs = [settings(run) for run in runs]
    keys = dict.fromkeys(
        key for config in configs for key in config if key not in OWN_KEYS and not key.startswith("logging.")
    )
    texts = {key: [str(config.get(key, "-")) for config in configs] for key in keys}
    return {key: cells for key, cells in texts.items() if len(set(cells)) > 1}


def experiments(differ: dict[str, list[str]], count: int) -> list[int]:
    """Return for each of `count` runs the number of its experiment: runs that differ in their seed only have one."""
    apart = [tuple(cells[run] for key, cells in differ.items() if key != SEED) for run in range(count)]
    if SEED not in differ:  # twice the same: nothing says that they are to be averaged
        return list(range(count))
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(apart))}
    return [numbers[kind] for kind in apart]


def mean_phases(run: Progress, of: Callable[[Record], dict[str, float]] = phases) -> dict[str, float]:
    """Return the mean seconds of each phase over the run's steps."""
    sums: dict[str, float] = {}
    for one in run.steps:
        for phase, seconds in of(one).items():
            sums[phase] = sums.get(phase, 0.0) + seconds
    return {phase: total / len(run.steps) for phase, total in sums.items()}
