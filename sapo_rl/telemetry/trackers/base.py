"""What a tracker is, and what it is told of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sapo_rl.config.logging import LoggingConfig
from sapo_rl.telemetry.metrics import Record
from sapo_rl.telemetry.sinks.completions import Row


@dataclass(frozen=True)
class TrackedRun:
    """A run, as its trackers see it."""

    folder: Path
    """The run folder."""
    name: str
    """`logging.name`, or what stands for it."""
    group: str | None
    """`logging.group`, or the sweep that the run is one of."""
    logging: LoggingConfig
    settings: dict[str, Any]
    """The run's config as its folder keeps it: secrets are references."""
    run_id: str | None
    """The tracker's `run_id` of an earlier start of this run; None in its first."""
    resumed_after: int | None
    """The last step that was done before this start; None in its first."""
    columns: list[str]
    """Of the rows that are logged, those that a table shows."""
    warn: Callable[[str], None]
    """Takes one-line warnings."""


class Tracker(Protocol):
    """Takes a run's numbers to another place; rank 0 alone has any.

    One of your own is named by dotted path in `logging.trackers`: a class, or a function, that is called with a
    `TrackedRun`. An exception that it raises is told once, and the run goes on.

    Example:
        >>> class Lines:
        ...     run_id, where = None, "lines.txt"
        ...     def __init__(self, run):
        ...         self.file = open(run.folder / "lines.txt", "a")
        ...     def log(self, record, rows):
        ...         print(record["step"], record.get("reward/mean"), file=self.file)
        ...     def finish(self, failed):
        ...         self.file.close()
    """

    run_id: str | None
    """What a resume finds this run again by, kept in the run folder; None where nothing is needed."""
    where: str
    """Where a user looks at the run: an address, a folder, or a command."""

    def log(self, record: Record, rows: Sequence[Row]) -> None:
        """Take a record, as it stands in metrics.jsonl; the run waits for this to return.

        Args:
            record: `step`, `time`, and numbers by name; None where one was not finite.
            rows: `logging.completions` completions of that step, from the lowest reward to the highest; now and then
                only, else none.
        """
        ...

    def finish(self, failed: bool) -> None:
        """End the run; `failed` where it is not complete."""
        ...


def numbers_of(record: Record) -> dict[str, float]:
    """Return the numbers of a record, `step` among them."""
    return {name: value for name, value in record.items() if isinstance(value, int | float)}
