"""The live panel: progress, curves, where the time goes, and what the model writes right now."""

from __future__ import annotations

import time

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sapo_rl.telemetry.progress import Progress, duration, numbers, one_line, phases, short, sparkline

CURVES = {
    "reward": "reward/mean",
    "eval": "eval/reward",
    "entropy": "policy/entropy",
    "tok/s": "perf/tokens_per_second",
}
NUMBERS = {
    "loss": "policy/loss",
    "grad": "policy/grad_norm",
    "kl": "policy/kl_old_k3",
    "ratio max": "policy/ratio_max",
    "length": "completions/mean_length",
    "cut": "completions/clipped_ratio",
    "zero spread": "group/zero_spread_fraction",
}
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")


class LivePanel:
    """Redraws one panel in place, also between steps, so that the clock runs; other output scrolls above it."""

    def __init__(self, out: Console) -> None:
        self._progress: Progress | None = None
        self._started = time.monotonic()
        self._live = Live(console=out, get_renderable=self._draw, refresh_per_second=2)

    def start(self, progress: Progress) -> None:
        """Put the panel on the terminal."""
        self._progress = progress
        self._live.start()

    def step(self, progress: Progress) -> None:
        """Redraw at once."""
        self._live.refresh()

    def evaluated(self, progress: Progress) -> None:
        """Redraw at once."""
        self._live.refresh()

    def show(self, content: RenderableType) -> None:
        """Print above the panel, or below it once it is closed."""
        self._live.console.print(content, crop=False)

    def close(self) -> None:
        """Leave the last frame where it is and give the terminal back."""
        self._live.stop()

    def _draw(self) -> RenderableType:
        if self._progress is None:
            return Text()
        return panel(self._progress, time.monotonic() - self._started, self._live.console.width)


def panel(progress: Progress, elapsed: float, width: int) -> RenderableType:
    """Return the whole panel for a terminal of `width` columns; `elapsed` in seconds."""
    inner = min(width, 120) - 4
    parts: list[RenderableType] = [_bar(progress, elapsed), _curves(progress, inner)]
    if progress.steps:
        parts += [_numbers(progress), _split(progress, inner)]
    if progress.sample:
        parts += [Text(), _sample(progress, inner)]
    title = Text.assemble(("sapo-train ", "bold"), str(progress.folder))
    about = Text("  ".join(f"{key} {text}" for key, text in progress.header.items()), style="dim")
    return Panel(Group(*parts), title=title, subtitle=about, width=min(width, 120), border_style="dim")


def _bar(progress: Progress, elapsed: float) -> RenderableType:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    times = f"{duration(elapsed)}, {duration(progress.eta())} left" if progress.steps else duration(elapsed)
    count = Text(f"step {progress.step}/{progress.total}", style="bold")
    grid.add_row(count, ProgressBar(progress.total, progress.step), Text(times))
    return grid


def _curves(progress: Progress, inner: int) -> RenderableType:
    across = 2 if inner >= 54 else 1
    room = max(1, inner // across - 18)  # what label, value and padding leave to the curve
    grid = Table.grid(padding=(0, 1))
    cells: list[Text] = []
    for _ in range(across):
        grid.add_column(no_wrap=True, style="dim", width=8)
        grid.add_column(no_wrap=True, justify="right", width=7)
        grid.add_column(no_wrap=True, width=room)
    for label, name in CURVES.items():
        values = numbers(progress.evals if name.startswith("eval/") else progress.steps, name)
        latest = Text(short(values[-1]) if values else "-", style="bold")
        cells += [Text(label), latest, Text(sparkline(values, room), style="cyan")]
    for first in range(0, len(cells), 3 * across):
        grid.add_row(*cells[first : first + 3 * across])
    return grid


def _numbers(progress: Progress) -> RenderableType:
    record = progress.steps[-1]
    found = {label: record[name] for label, name in NUMBERS.items() if record.get(name) is not None}
    return Columns(
        [Text.assemble((f"{label} ", "dim"), short(value)) for label, value in found.items()], padding=(0, 2)
    )


def _split(progress: Progress, inner: int) -> RenderableType:
    """One bar over the panel's width: the share of each phase in the last step, and its seconds below."""
    seconds = phases(progress.steps[-1])
    whole = sum(seconds.values())
    if whole <= 0:
        return Text()
    bar, legend, drawn, passed = Text(), [], 0, 0.0
    for place, (phase, spent) in enumerate(seconds.items()):
        colour = COLOURS[place % len(COLOURS)]
        passed += spent
        until = round(passed / whole * inner)
        bar.append("━" * (until - drawn), style=colour)
        legend.append(Text.assemble(("● ", colour), f"{phase} {duration(spent)} {spent / whole:.0%}"))
        drawn = until
    return Group(bar, Columns(legend, padding=(0, 2)))


def _sample(progress: Progress, inner: int) -> RenderableType:
    sample = progress.sample or {}
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    grid.add_row("prompt", Text(one_line(sample["prompt"], 2 * (inner - 12))))
    grid.add_row("reply", Text(one_line(sample["completion"], 3 * (inner - 12)), style="italic"))
    rewards = {name.removeprefix("rewards/"): value for name, value in sample.items() if name.startswith("rewards/")}
    rewards |= {"total": sample["reward"], "advantage": sample["advantage"]}
    written = [f"{name} {'-' if value is None else short(value)}" for name, value in rewards.items()]
    grid.add_row("rewards", Text("   ".join(written)))
    return grid
