"""`sapo-report RUN_DIR ...`: curves and a table out of metrics.jsonl alone.

Also as `python -m sapo_rl.telemetry.report`.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sapo_rl.config.nested import leaves
from sapo_rl.errors import UserError
from sapo_rl.processes import streams
from sapo_rl.run_folder import CONFIG, METRICS
from sapo_rl.telemetry.metrics import read_metrics
from sapo_rl.telemetry.progress import (
    Progress,
    Record,
    beside,
    duration,
    numbers,
    one_line,
    phases,
    short,
    step_seconds,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#787774", "#cb912f", "#337ea9")
PANELS = (
    ("mean reward", "reward/mean"),
    ("entropy of the policy (nats)", "policy/entropy"),
    ("largest ratio now / at rollout", "policy/ratio_max"),
)
"""The small curves: title and metric."""
LOG_FROM = 100.0
"""Ratio above which its curve is drawn on a logarithmic scale."""
OWN_KEYS = ("description", "resume", "dry_run", "check", "run_dir", "logging.name")
"""Keys that say nothing about how two runs differ."""
WIDE = 200
"""Columns of a table that is not printed to a terminal."""
IN_LEGEND = 2
"""As many settings that differ are written into the picture's legend; with more it names the folders alone."""


def main(argv: Sequence[str] | None = None) -> int:
    """Draw and print the runs named on the command line; return 2 for a mistake in it."""
    parser = argparse.ArgumentParser("sapo-report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--out", type=Path, help="the picture; default: report.png in the run's folder, of several runs in this folder"
    )
    arguments = parser.parse_args(argv)
    streams.prepare()
    folders: dict[Path, Path] = {}
    for folder in arguments.runs:  # `latest` is a link to a run that `runs/mine/*` names as well
        folders.setdefault(folder.resolve(), folder)
    try:
        runs = _load_all(list(folders.values()))
        out = arguments.out or (runs[0].folder if len(folders) == 1 else Path()) / "report.png"
        differ = differences(runs)
        draw(runs, out, differ)
    except UserError as error:
        print(f"sapo-report: {error}", file=sys.stderr)
        return 2
    show(table(runs, differ))
    print(f"picture: {out}")
    return 0


def _load_all(folders: Sequence[Path]) -> list[Progress]:
    """Load the runs; of several, those without numbers are told of and left out."""
    runs = []
    for folder in folders:
        try:
            runs.append(load(folder))
        except UserError as error:
            if folder == folders[-1] and not runs:
                raise
            print(f"sapo-report: left out: {error}", file=sys.stderr)
    return runs


def load(folder: Path) -> Progress:
    """Read a run's records, those of all its steps.

    Raises:
        UserError: the folder has no metrics, or they hold no step and no evaluation.
    """
    records = read_metrics(folder / METRICS)
    run = Progress(folder, total=max((record["step"] for record in records), default=0), steps=deque())
    for record in records:
        run.add(record)
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


def differences(runs: Sequence[Progress]) -> dict[str, list[str]]:
    """Return the settings that differ between the runs, by key: a text for each run, `-` where it has no such key."""
    configs = [dict(leaves(_config(run.folder))) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    texts = {key: [one_line(str(config.get(key, "-")), 40) for config in configs] for key in keys}
    return {key: cells for key, cells in texts.items() if len(set(cells)) > 1 and key not in OWN_KEYS}


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"'{path}' cannot be read: {one_line(str(error), 200)}") from error
    return found if isinstance(found, dict) else {}


def table(runs: Sequence[Progress], differ: dict[str, list[str]]) -> Table:
    """Return what differs between the runs (see `differences`) and how far each came, a column a run."""
    found = Table("", *labels(runs), box=None, padding=(0, 2, 0, 0))
    for key, cells in differ.items():
        found.add_row(key, *map(escape, cells))
    found.add_row("steps", *(str(run.step) for run in runs))
    for title, get in (
        ("eval reward", lambda run: run.eval_rewards),
        ("reward", lambda run: numbers(run.steps, "reward/mean")),
    ):
        for word, pick in (("first", lambda values: values[0]), ("last", lambda values: values[-1]), ("best", max)):
            cells = [short(pick(values)) if (values := get(run)) else "-" for run in runs]
            found.add_row(f"{title}, {word}", *cells)
    found.add_row("tokens/s, mean", *(_mean(numbers(run.steps, "perf/tokens_per_second")) for run in runs))
    found.add_row("seconds a step", *(_mean([step_seconds(record) for record in run.steps]) for run in runs))
    found.add_row("whole time", *(duration(max(r["time"] for r in [*run.steps, *run.evals])) for run in runs))
    splits = [mean_phases(run) for run in runs]
    for phase in dict.fromkeys(phase for split in splits for phase in split):
        cells = [f"{split[phase]:.2f}s {_share(split, phase):.0%}" if phase in split else "-" for split in splits]
        found.add_row(f"  {phase}", *cells)
    meanwhile = [mean_phases(run, beside) for run in runs]
    for phase in dict.fromkeys(phase for split in meanwhile for phase in split):
        cells = [f"{split[phase]:.2f}s" if phase in split else "-" for split in meanwhile]
        found.add_row(f"  {phase}, beside", *cells)
    return found


def show(wide: Table) -> None:
    """Print a table that may have many columns: to a file or a pipe in one piece."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    console.print(wide, crop=False)


def mean_phases(run: Progress, of: Callable[[Record], dict[str, float]] = phases) -> dict[str, float]:
    """Return the mean seconds of each phase over the run's steps."""
    sums: dict[str, float] = {}
    for record in run.steps:
        for phase, seconds in of(record).items():
            sums[phase] = sums.get(phase, 0.0) + seconds
    return {phase: total / len(run.steps) for phase, total in sums.items()}


def draw(runs: Sequence[Progress], out: Path, differ: dict[str, list[str]]) -> None:
    """Write the picture: the reward on held-out prompts, small curves below it, and where the time of a step goes.

    Raises:
        UserError: it cannot be written to `out`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    bars = 0.3 * len(runs)
    figure = pyplot.figure(figsize=(10, 7.6 + bars), dpi=150, layout=ConstrainedLayoutEngine(hspace=0.07))
    grid = figure.add_gridspec(3, 3, height_ratios=[3.2, 1.8, 1.0 + bars])
    large = figure.add_subplot(grid[0, :])
    names = _legend(runs, differ)
    for run, name, colour in zip(runs, names, _colours(len(runs)), strict=True):
        _curve(large, run, "eval/reward", colour, name)
    large.set(title="reward on held-out prompts (greedy)", xlabel="step")
    if all(0 <= value <= 1 for run in runs for value in run.eval_rewards):
        large.set_ylim(0, 1)
    large.legend(frameon=False)
    for place, (title, metric) in enumerate(PANELS):
        axes = figure.add_subplot(grid[1, place])
        axes.set(title=title, xlabel="step")
        for run, colour in zip(runs, _colours(len(runs)), strict=True):
            _curve(axes, run, metric, colour, None)
    split = figure.add_subplot(grid[2, :])
    _bars(split, runs, names)
    last = max(1, *(run.total for run in runs))
    for axes in figure.axes[:-1]:
        axes.set_xlim(-0.02 * last, 1.02 * last)
    figure.legend(*split.get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False, fontsize=9)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
        axes.tick_params(labelsize=9)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    except (OSError, ValueError) as error:  # the latter for an ending that stands for no format
        raise UserError(f"--out: '{out}' cannot be written: {error}") from error
    finally:
        pyplot.close(figure)


def _legend(runs: Sequence[Progress], differ: dict[str, list[str]]) -> list[str]:
    """The runs' names, with what differs where that is little: folders are mostly named by the time of the start."""
    if not 0 < len(differ) <= IN_LEGEND:
        return labels(runs)
    texts = [", ".join(f"{key}={cells[run]}" for key, cells in differ.items()) for run in range(len(runs))]
    return [f"{text}  ({name})" for text, name in zip(texts, labels(runs), strict=True)]


def _curve(axes: Axes, run: Progress, metric: str, colour: str, label: str | None) -> None:
    from matplotlib.ticker import MaxNLocator

    records = run.evals if metric.startswith("eval/") else run.steps
    points = [(record["step"], record[metric]) for record in records if record.get(metric) is not None]
    steps, values = [step for step, _ in points], [value for _, value in points]
    marker = "o" if len(points) < 40 else ""
    axes.plot(steps, values, color=colour, label=label, linewidth=1.6, marker=marker, markersize=3)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if metric == "policy/ratio_max" and values and max(values) > LOG_FROM:
        axes.set_yscale("log")  # one step that ran away would flatten all others


def _bars(axes: Axes, runs: Sequence[Progress], names: Sequence[str]) -> None:
    splits = [mean_phases(run) for run in runs]
    found = dict.fromkeys(phase for split in splits for phase in split)
    ends = [0.0] * len(runs)
    for phase, colour in zip(found, COLOURS * 3, strict=False):
        widths = [split.get(phase, 0.0) for split in splits]
        axes.barh(range(len(runs)), widths, left=ends, height=0.6, color=colour, label=phase)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    axes.set(title="where a step's time goes", xlabel="seconds, mean over steps", ylim=(len(runs) - 0.5, -0.5))
    axes.set_yticks(range(len(runs)), names if len(runs) > 1 else [""])
    axes.tick_params(axis="y", length=0)


def _colours(count: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(count)]


def _mean(values: Sequence[float]) -> str:
    return short(sum(values) / len(values)) if values else "-"


def _share(split: dict[str, float], phase: str) -> float:
    return split[phase] / (sum(split.values()) or 1.0)


if __name__ == "__main__":
    sys.exit(main())
