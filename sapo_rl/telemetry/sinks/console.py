"""The terminal: one dense line a step, or a live panel. Used by rank 0 only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from rich.console import Console, RenderableType
from rich.text import Text

from sapo_rl.telemetry.progress import Progress, duration, short, step_seconds
from sapo_rl.telemetry.sinks.live import LivePanel

FIELDS: tuple[tuple[str, tuple[str, ...], Callable[[float], str]], ...] = (
    ("reward", ("reward/mean",), short),
    ("loss", ("policy/loss",), short),
    ("grad", ("policy/grad_norm",), short),
    ("kl", ("policy/kl_ref", "policy/kl_old_k3"), short),
    ("ratio", ("policy/ratio_max",), short),
    ("len", ("completions/mean_length",), short),
    ("cut", ("completions/clipped_ratio",), "{:.0%}".format),
    ("tok/s", ("perf/tokens_per_second",), short),
)
"""Label, metric (the first that a step has), and format of each entry of a step's line."""


class Display(Protocol):
    """What shows the run to the user."""

    def start(self, progress: Progress) -> None:
        """The run begins."""

    def step(self, progress: Progress) -> None:
        """A step was added to `progress`."""

    def evaluated(self, progress: Progress) -> None:
        """An evaluation was added to `progress`."""

    def show(self, content: RenderableType) -> None:
        """Print something that stays."""

    def close(self) -> None:
        """Give the terminal back."""


def open_display(kind: str) -> Display:
    """Return the display that `logging.console` asks for; `auto` is live on a terminal and plain elsewhere."""
    out = Console(force_terminal=True if kind == "live" else None)
    if kind == "none":
        return Silent()
    if kind == "live" or (kind == "auto" and out.is_terminal and not out.is_dumb_terminal):
        return LivePanel(out)
    return Plain(out)


class Silent:
    """Shows nothing."""

    def start(self, progress: Progress) -> None:
        """Show nothing."""

    def step(self, progress: Progress) -> None:
        """Show nothing."""

    def evaluated(self, progress: Progress) -> None:
        """Show nothing."""

    def show(self, content: RenderableType) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Do nothing."""


class Plain:
    """One line a step and one an evaluation: for logs, pipes and schedulers."""

    def __init__(self, out: Console) -> None:
        self._out = out

    def start(self, progress: Progress) -> None:
        """Print what is known of the run."""
        self._line(" | ".join([f"run {progress.folder}", *(f"{key} {text}" for key, text in progress.header.items())]))

    def step(self, progress: Progress) -> None:
        """Print the step's line."""
        self._line(step_line(progress))

    def evaluated(self, progress: Progress) -> None:
        """Print the evaluation's line."""
        record = progress.evals[-1]
        found = [f"{name.removeprefix('eval/')} {short(value)}" for name, value in eval_numbers(record).items()]
        self._line(" | ".join([f"eval {step_count(record['step'], progress.total)}", *found]))

    def show(self, content: RenderableType) -> None:
        """Print something that stays."""
        self._out.print(content, soft_wrap=isinstance(content, Text), crop=False)

    def close(self) -> None:
        """Nothing to give back."""

    def _line(self, text: str) -> None:
        self._out.print(Text(text), soft_wrap=True)


def eval_numbers(record: dict[str, float | None]) -> dict[str, float]:
    """Return the `eval/*` of an evaluation's record that have a value."""
    return {name: value for name, value in record.items() if name.startswith("eval/") and value is not None}


def step_count(step: int, total: int) -> str:
    """Write `step/total`, aligned over the run."""
    return f"{step:>{len(str(total))}}/{total}"


def step_line(progress: Progress) -> str:
    """Write the last step as one line: counts, quality, stability, speed, time left."""
    record = progress.steps[-1]
    parts = [f"step {step_count(record['step'], progress.total)}"]
    for label, names, write in FIELDS:
        value = next((record[name] for name in names if record.get(name) is not None), None)
        if value is not None:
            parts.append(f"{label} {write(value)}")
        if label == "reward" and progress.eval_rewards:
            parts.append(f"eval {short(progress.eval_rewards[-1])}")
    return " | ".join([*parts, duration(step_seconds(record)), f"eta {duration(progress.eta())}"])
