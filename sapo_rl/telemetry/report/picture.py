"""The curves of runs as one picture, for a page or a paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sapo_rl.errors import UserError
from sapo_rl.telemetry.progress import Progress, one_line
from sapo_rl.telemetry.report.runs import labels, mean_phases
from sapo_rl.telemetry.report.table import CELL

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
IN_LEGEND = 2
"""As many settings that differ are written into the picture's legend; with more it names the folders alone."""


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
    texts = [
        ", ".join(f"{key}={one_line(cells[run], CELL)}" for key, cells in differ.items()) for run in range(len(runs))
    ]
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
