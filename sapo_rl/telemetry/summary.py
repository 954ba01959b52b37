"""What the user sees at the end: before and after, where everything lies, what to try next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sapo_rl.run_folder import CHECKPOINTS, COMPLETIONS, CONFIG, FINAL, METRICS
from sapo_rl.telemetry.progress import Progress, duration, one_line, short

SHOWN = 3
"""Prompts whose completions are shown before and after."""
SAVED = {
    FINAL: "trained model",
    CHECKPOINTS: "checkpoints",
    METRICS: "every number",
    COMPLETIONS: "every completion",
    CONFIG: "resolved config",
}

Examples = list[tuple[str, str]]
"""(prompt, completion) pairs of an evaluation."""


def summary(
    progress: Progress, before: Examples, after: Examples, tracked: Mapping[str, str], next_command: str
) -> RenderableType:
    """Return the closing tables.

    Args:
        progress: the finished run.
        before: the first evaluation's completions.
        after: the last evaluation's.
        tracked: where to look at the run in each of its trackers, by their names.
        next_command: a command line to try next.
    """
    parts: list[RenderableType] = [Text(), _numbers(progress)]
    if before and len(progress.evals) > 1:
        parts += [Text(), _examples(before, dict(after), progress)]
    parts += [Text(), _saved(progress.folder, tracked), Text(), _whole(f"next: {next_command}"), Text()]
    return Group(*parts)


def _numbers(progress: Progress) -> RenderableType:
    table = Table("", "before", "after", box=None, title="Result", title_justify="left", padding=(0, 2, 0, 0))
    if progress.evals:
        first, last = progress.evals[0], progress.evals[-1]
        for name in (name for name in first if name.startswith("eval/")):
            table.add_row(name, _cell(first[name]), _cell(last.get(name)))
    if progress.first_step:
        for name in ("reward/mean", "completions/mean_length", "policy/entropy"):
            if name in progress.first_step:
                table.add_row(name, _cell(progress.first_step[name]), _cell(progress.steps[-1].get(name)))
    seconds = max((record["time"] for record in [*progress.steps, *progress.evals]), default=0.0)
    return Group(table, Text(f"{progress.step} steps in {duration(seconds)}"))


def _cell(value: float | None) -> str:
    return "-" if value is None else short(value)


def _examples(before: Examples, after: dict[str, str], progress: Progress) -> RenderableType:
    first, last = progress.evals[0]["step"], progress.evals[-1]["step"]
    table = Table("prompt", f"before (step {first})", f"after (step {last})", show_lines=True)
    for prompt, text in before[:SHOWN]:
        if prompt in after:
            table.add_row(*(Text(one_line(cell, 160)) for cell in (prompt, text, after[prompt])))
    return table


def _saved(folder: Path, tracked: Mapping[str, str]) -> RenderableType:
    found = {meaning: str(folder / name) for name, meaning in SAVED.items() if (folder / name).exists()}
    found.update(tracked)
    width = max((len(meaning) for meaning in found), default=0)
    return Group(*(_whole(f"{meaning:<{width}}  {path}") for meaning, path in found.items()))


def _whole(text: str) -> Text:
    """A line that is never broken, so that paths and commands can be copied."""
    return Text(text, no_wrap=True, overflow="ignore")
