"""TensorBoard: event files in the run folder, by torch's own writer."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from sapo_rl.config.nested import leaves
from sapo_rl.run_folder import TENSORBOARD
from sapo_rl.telemetry.metrics import Record
from sapo_rl.telemetry.sinks.completions import Row
from sapo_rl.telemetry.trackers.base import TrackedRun, numbers_of

FLUSH_SECONDS = 10
"""What a killed run loses at most."""
COMPARED = ("eval/reward", "reward/mean")
"""Metrics beside the settings in the tab that compares runs."""


class TensorboardTracker:
    """Scalars of every record, the config as text and hyperparameters, completions as tables of text."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.run_id: str | None = None
        folder = run.folder / TENSORBOARD
        self.where = f"tensorboard --logdir {folder}"
        self._columns = run.columns
        redone = None if run.resumed_after is None else run.resumed_after + 1  # these steps are shown once
        self._writer = SummaryWriter(str(folder), purge_step=redone, flush_secs=FLUSH_SECONDS)
        self._writer.add_text("config", f"```yaml\n{yaml.safe_dump(run.settings, sort_keys=False)}```", redone or 0)
        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in leaves(run.settings, empty=True)
        }
        assert self._writer.file_writer is not None
        for summary in hparams(plain, dict.fromkeys(COMPARED, 0.0)):
            self._writer.file_writer.add_summary(summary)

    def log(self, record: Record, rows: Sequence[Row]) -> None:
        """Write a record's numbers at its step."""
        for name, value in numbers_of(record).items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])
        if rows:
            self._writer.add_text("completions", _markdown(self._columns, rows), record["step"])

    def finish(self, failed: bool) -> None:
        """Close the file."""
        self._writer.close()


def _markdown(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """A table whose cells are texts in one line each."""
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: object) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")
