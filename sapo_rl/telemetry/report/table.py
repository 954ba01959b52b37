"""The table that is printed: what differs between runs, and how far each came."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sapo_rl.telemetry.progress import Progress, beside, duration, numbers, one_line, short, step_seconds
from sapo_rl.telemetry.report.runs import labels, mean_phases, sweep_of

WIDE = 200
"""Columns of a table that is not printed to a terminal."""
CELL = 40
"""Characters of a setting that are shown."""


def results(runs: Sequence[Progress]) -> dict[str, list[str]]:
    """Return how far each run came and where its time went: title of a row to a text for each run."""
    found = {"steps": [str(run.step) for run in runs]}
    for title, get in (
        ("eval reward", lambda run: run.eval_rewards),
        ("reward", lambda run: numbers(run.steps, "reward/mean")),
    ):
        for word, pick in (("first", lambda values: values[0]), ("last", lambda values: values[-1]), ("best", max)):
            found[f"{title}, {word}"] = [short(pick(values)) if (values := get(run)) else "-" for run in runs]
    found["tokens/s, mean"] = [_mean(numbers(run.steps, "perf/tokens_per_second")) for run in runs]
    found["seconds a step"] = [_mean([step_seconds(record) for record in run.steps]) for run in runs]
    found["whole time"] = [duration(max(r["time"] for r in [*run.steps, *run.evals])) for run in runs]
    splits = [mean_phases(run) for run in runs]
    for phase in dict.fromkeys(phase for split in splits for phase in split):
        cells = [f"{split[phase]:.2f}s {_share(split, phase):.0%}" if phase in split else "-" for split in splits]
        found[f"  {phase}"] = cells
    meanwhile = [mean_phases(run, beside) for run in runs]
    for phase in dict.fromkeys(phase for split in meanwhile for phase in split):
        found[f"  {phase}, beside"] = [f"{split[phase]:.2f}s" if phase in split else "-" for split in meanwhile]
    return found


def table(runs: Sequence[Progress], differ: dict[str, list[str]]) -> Table:
    """Return what differs between the runs (see `runs.differences`) and their `results`, a column a run."""
    found = Table("", *labels(runs), box=None, padding=(0, 2, 0, 0))
    if any(sweeps := [sweep_of(run) for run in runs]):
        found.add_row("sweep", *(escape(sweep.removeprefix("sweep ") or "-") for sweep in sweeps))
    for key, cells in differ.items():
        found.add_row(key, *(escape(one_line(cell, CELL)) for cell in cells))
    for title, cells in results(runs).items():
        found.add_row(title, *cells)
    return found


def show(wide: Table) -> None:
    """Print a table that may have many columns: to a file or a pipe in one piece."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    console.print(wide, crop=False)


def _mean(values: Sequence[float]) -> str:
    return short(sum(values) / len(values)) if values else "-"


def _share(split: dict[str, float], phase: str) -> float:
    return split[phase] / (sum(split.values()) or 1.0)
