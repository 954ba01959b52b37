"""MLflow: the server or database that MLFLOW_TRACKING_URI names, else its default, mlflow.db in the current folder."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from sapo_rl.config.nested import leaves
from sapo_rl.telemetry.metrics import Record
from sapo_rl.telemetry.sinks.completions import Row
from sapo_rl.telemetry.trackers.base import TrackedRun, numbers_of

FINISH_SECONDS = 60
"""How long the end may wait for what is not sent yet."""
LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}
"""MLflow's own are four minutes and more for a server that does not answer, and the start of a run waits for it."""
BATCH = 100
"""Parameters that MLflow takes at once."""


class MlflowTracker:
    """One MLflow run of the experiment `logging.project`; a thread sends its numbers.

    MLflow's artifacts may be anywhere, and take no increments: completions are not sent.
    """

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        for name, value in LIMITS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        for name in ("alembic", "mlflow"):  # which tell what they do with the database
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = MlflowClient()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._sent: list[Future[Any]] = []
        if run.run_id:
            self._client.update_run(run.run_id, status="RUNNING")
        self.run_id: str = run.run_id or _create(self._client, run)
        self.where = f"run {self.run_id} at {self._client.tracking_uri}"
        if run.run_id:
            return  # parameters are written once
        params = [Param(_allowed(key), str(value)) for key, value in leaves(run.settings, empty=True)]
        for first in range(0, len(params), BATCH):
            self._client.log_batch(self.run_id, params=params[first : first + BATCH])

    def log(self, record: Record, rows: Sequence[Row]) -> None:
        """Have a record's numbers sent; raise what went wrong with an earlier one."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(_allowed(name), value, now, record["step"])
            for name, value in numbers_of(record).items()
            if name != "step"
        ]
        self._sent.append(self._sender.submit(self._client.log_batch, self.run_id, metrics))
        for done in self._done():
            done.result()

    def finish(self, failed: bool) -> None:
        """Send what is left, within `FINISH_SECONDS`, and end the run."""
        status = "FAILED" if failed else "FINISHED"
        self._sent.append(self._sender.submit(self._client.set_terminated, self.run_id, status))
        self._sender.shutdown(wait=False)
        late = wait(self._sent, FINISH_SECONDS).not_done
        for future in self._done():
            future.result()
        if late:
            raise TimeoutError(f"{len(late)} records were not taken within {FINISH_SECONDS} s")

    def _done(self) -> Iterator[Future[Any]]:
        """Those that are sent, or have failed, since this was asked last."""
        while self._sent and self._sent[0].done():
            yield self._sent.pop(0)


def _create(client: Any, run: TrackedRun) -> str:
    found = client.get_experiment_by_name(run.logging.project)
    experiment = found.experiment_id if found else client.create_experiment(run.logging.project)
    tags = {"run_folder": str(run.folder.absolute())} | dict.fromkeys(run.logging.tags, "")
    if run.group:
        tags["group"] = run.group
    return client.create_run(experiment, run_name=run.name, tags=tags).info.run_id


def _allowed(name: str) -> str:
    """A name with the characters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)
