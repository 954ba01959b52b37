"""Where a run's numbers go besides its folder: W&B, TensorBoard, trackio, MLflow, or a user's own tracker."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from sapo_rl import plugins
from sapo_rl.config import Config
from sapo_rl.config.logging import LoggingConfig
from sapo_rl.errors import first_line
from sapo_rl.errors.own_code import shorten
from sapo_rl.run_folder import CONFIG, record
from sapo_rl.telemetry.metrics import Record
from sapo_rl.telemetry.sinks.completions import COLUMNS, JSON_COLUMNS, Row
from sapo_rl.telemetry.trackers.base import TrackedRun, Tracker
from sapo_rl.telemetry.trackers.wandb import choose_mode

__all__ = ["TrackedRun", "Tracker", "Trackers", "chosen", "find", "spread"]

BUILT_IN = {
    "mlflow": "sapo_rl.telemetry.trackers.mlflow.MlflowTracker",
    "tensorboard": "sapo_rl.telemetry.trackers.tensorboard.TensorboardTracker",
    "trackio": "sapo_rl.telemetry.trackers.trackio.TrackioTracker",
    "wandb": "sapo_rl.telemetry.trackers.wandb.WandbTracker",
}
LABELS = {"mlflow": "MLflow", "tensorboard": "TensorBoard", "wandb": "Weights & Biases"}
SHOWN = 120
"""Characters shown of what a tracker raises: the address stands at its beginning, the cause at its end."""
TABLES = 100
"""Tables of completions in a run, at most: W&B shows the last hundred increments of one."""


def chosen(settings: LoggingConfig) -> list[str]:
    """Return the names of the trackers that a run has; W&B is none of them where it is off."""
    off = choose_mode(settings.wandb, os.environ, Path.home()) == "off"
    return [name for name in settings.trackers if not (off and name == "wandb")]


def find(name: str) -> Callable[[TrackedRun], Tracker]:
    """Import and return what makes the tracker of this name or dotted path.

    Raises:
        UserError: there is none.
    """
    return plugins.find("tracker", BUILT_IN.get(name, name))


class Trackers:
    """All trackers of a run. One that fails is told once, and stays: the server that it talks to may come back.

    Args:
        config: the run's config.
        folder: the run folder. Trackers are shown its config.yaml, without secrets; their ids are kept in it.
        resumed_after: the last step of the checkpoint that is resumed; None starts anew.
        warn: takes one-line warnings.
    """

    def __init__(self, config: Config, folder: Path, resumed_after: int | None, warn: Callable[[str], None]) -> None:
        self._warn, self._warned = warn, set[str]()
        self._rows, self._steps = config.logging.completions, config.trainer.steps
        self._open: dict[str, Tracker] = {}
        names = chosen(config.logging)
        kept = record.read(folder) if names else {}
        for name in names:
            if run := self._try(name, partial(_start, name, config, folder, resumed_after, kept, warn)):
                self._open[name] = run
        if ids := {name: run.run_id for name, run in self._open.items() if run.run_id}:
            record.add(folder, {record.TRACKERS: kept.get(record.TRACKERS, {}) | ids})

    @property
    def where(self) -> dict[str, str]:
        """Where to look at the run, by the tracker's name for users."""
        return {LABELS.get(name, name): run.where for name, run in self._open.items()}

    def log(self, values: Record, samples: Sequence[Row] = ()) -> None:
        """Hand a record to all of them, and now and then some of the completions."""
        due = samples and self._rows and self._is_table_due(values["step"])
        rows = spread(samples, self._rows) if due else []
        for name, run in self._open.items():
            self._try(name, partial(run.log, values, rows))

    def finish(self, failed: bool) -> None:
        """End the run in all of them."""
        for name, run in self._open.items():
            self._try(name, partial(run.finish, failed))
        self._open.clear()

    def _try(self, name: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # whatever a tracker does, the run goes on
            if name not in self._warned:
                self._warned.add(name)
                told = shorten(first_line(error), SHOWN)
                self._warn(f"{LABELS.get(name, name)} fails ({told}); metrics.jsonl has every number")

    def _is_table_due(self, step: int) -> bool:
        return step % math.ceil(self._steps / TABLES) == 0 or step == self._steps


def _start(
    name: str,
    config: Config,
    folder: Path,
    resumed_after: int | None,
    kept: dict[str, Any],
    warn: Callable[[str], None],
) -> Tracker:
    told = [column for column in COLUMNS if column not in JSON_COLUMNS]
    run = TrackedRun(
        folder=folder,
        name=config.logging.name or kept.get(record.NAME, folder.name),
        group=config.logging.group or kept.get(record.SWEEP),
        logging=config.logging,
        settings=yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")),
        run_id=kept.get(record.TRACKERS, {}).get(name),
        resumed_after=resumed_after,
        columns=[*told, *(f"rewards/{reward}" for reward in config.rewards)],
        warn=warn,
    )
    return find(name)(run)


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """Return at most `count` rows, evenly spaced from the lowest reward to the highest, both ends included."""
    ranked = sorted(rows, key=lambda row: -math.inf if row["reward"] is None else row["reward"])
    if len(ranked) <= count:
        return ranked
    if count == 1:
        return ranked[-1:]
    return [ranked[round(place * (len(ranked) - 1) / (count - 1))] for place in range(count)]
