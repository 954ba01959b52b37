"""trackio: a local database, a Hugging Face Space (TRACKIO_SPACE_ID), or a server (TRACKIO_SERVER_URL)."""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Sequence
from typing import Any

from sapo_rl.config.nested import leaves
from sapo_rl.telemetry.metrics import Record
from sapo_rl.telemetry.sinks.completions import Row
from sapo_rl.telemetry.trackers.base import TrackedRun, numbers_of


class TrackioTracker:
    """One trackio run; a Space that trackio makes for it is private."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):  # what it says of itself
            self._run = trackio.init(
                project=run.logging.project,
                name=run.name,
                group=run.group,
                config=dict(leaves(run.settings, empty=True)),
                private=True,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        if run.run_id:  # of its own accord it goes on with the newest run of the name
            self._run.id = run.run_id
        self.run_id: str | None = self._run.id
        self.where = self._run.url or f"trackio show --project {shlex.quote(run.logging.project)}"
        self._columns = run.columns

    def log(self, record: Record, rows: Sequence[Row]) -> None:
        """Queue a record's numbers at its step, and its completions as a table."""
        import trackio

        payload: dict[str, Any] = {
            name: value for name, value in numbers_of(record).items() if name not in ("step", "time")
        }  # trackio has a time of its own
        if rows:
            data = [[row.get(column) for column in self._columns] for row in rows]
            payload["completions"] = trackio.Table(columns=[*self._columns], data=data)
        self._run.log(payload, step=record["step"])

    def finish(self, failed: bool) -> None:
        """Wait half a minute at most until everything is written."""
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()
