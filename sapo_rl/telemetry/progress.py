"""What a run has come to so far, and how its numbers are written for human eyes. Knows no terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from sapo_rl.telemetry.metrics import Record
from sapo_rl.telemetry.timers import ASIDE

WINDOW = 20
"""Steps over which the speed is averaged."""
BARS = "▁▂▃▄▅▆▇█"
BESIDE = ("rollout", "reward")
"""Phases of a batch that may be made while the one before is trained on."""


@dataclass
class Progress:
    """The state behind the console: filled from records, those of a resumed run's file included.

    Example:
        >>> progress = Progress(Path("runs/mine/latest"), total=100)
        >>> progress.add({"step": 0, "time": 0.5, "eval/reward": 0.25})
        >>> progress.add({"step": 1, "time": 6.8, "time/step": 6.3, "reward/mean": 0.5})
        >>> progress.step, progress.eval_rewards
        (1, [0.25])
    """

    folder: Path
    """The run folder."""
    total: int
    """Steps of the whole run."""
    header: dict[str, str] = field(default_factory=dict)
    """What to say about the run before it starts, e.g. model, recipe, device."""
    steps: deque[Record] = field(default_factory=lambda: deque(maxlen=256))
    """The latest step records."""
    first_step: Record | None = None
    """The first step record of the run."""
    evals: list[Record] = field(default_factory=list)
    """All evaluation records."""
    resumed_after: int = 0
    """Step from which this process resumed; earlier records are left out of speed and ETA."""
    sample: dict[str, Any] | None = None
    """The last completion, as a row of the Parquet file."""

    def add(self, record: Record) -> None:
        """Enter a record: an evaluation has `eval/*`, a step `time/*`; others, such as warnings, draw no curve."""
        if any(name.startswith("eval/") for name in record):
            self.evals.append(record)
        elif any(name.startswith("time/") for name in record):
            self.first_step = self.first_step or record
            self.steps.append(record)

    @property
    def step(self) -> int:
        """The last finished step; 0 before the first."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def eval_rewards(self) -> list[float]:
        """Every measured `eval/reward`, in order."""
        return numbers(self.evals, "eval/reward")

    def seconds_per_step(self) -> float | None:
        """Wall-clock seconds from step to step, evaluations included, over the last `WINDOW` of this process."""
        recent = [record for record in self.steps if record["step"] > self.resumed_after][-WINDOW - 1 :]
        if len(recent) > 1:
            return (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
        return step_seconds(recent[0]) if recent else None

    def eta(self) -> float | None:
        """Seconds that the rest of the run will take at the present speed."""
        each = self.seconds_per_step()
        return None if each is None else each * (self.total - self.step)


def numbers(records: Iterable[Record], name: str) -> list[float]:
    """Return the values of one metric, records without it (or with null) passed over."""
    return [record[name] for record in records if record.get(name) is not None]


def phases(record: Record) -> dict[str, float]:
    """Return seconds by phase of one step; `other` is what `time/step` holds beyond its phases.

    Where completions were written beside the training, the phases are the trainer's; `beside` has the others.
    """
    apart = ("step", "environment", *ASIDE, *beside(record))  # an episode's wait is a part of the rollout
    found = {
        name.removeprefix("time/"): seconds
        for name, seconds in record.items()
        if name.startswith("time/") and name.removeprefix("time/") not in apart and seconds is not None
    }
    other = step_seconds(record) - sum(found.values())
    return found | {"other": other} if other > 0 else found


def beside(record: Record) -> dict[str, float]:
    """Return seconds of what went on while the step trained: the next batch was written and scored."""
    if not record.get("time/wait"):  # nothing was written by another thread, for which the trainer had to wait
        return {}
    return {phase: seconds for phase in BESIDE if (seconds := record.get(f"time/{phase}")) is not None}


def step_seconds(record: Record) -> float:
    """Return the seconds that a step took, evaluations left out."""
    return record.get("time/step") or 0.0


def duration(seconds: float | None) -> str:
    """Write seconds as `4.2s`, `3m07s` or `2h05m`."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def short(number: float) -> str:
    """Write a number of any size in few characters: 0.531, -0.0123, 12.3, 1.2k, 64.0k, 3e-05."""
    size = abs(number)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{number:.1e}"
    if size >= 1000:
        return f"{number / 1000:.1f}k"
    if size >= 10:
        return f"{number:.1f}"
    return f"{number:.2f}" if size >= 1 else f"{number:.3f}" if size >= 0.1 else f"{number:.3g}"


def sparkline(values: list[float], width: int) -> str:
    """Draw values as at most `width` bars, each the mean of a stretch; a flat curve is drawn at the bottom."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(place * len(values) / count) for place in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def one_line(text: str, width: int) -> str:
    """Return text on one line without control characters, its middle left out where it is longer than `width`."""
    flat = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    if len(flat) <= width:
        return flat
    head = (width - 3) // 2
    return f"{flat[:head]} … {flat[len(flat) - (width - 3 - head) :]}"
