"""Weights & Biases as one more sink: quiet, offline when it must be, never in the run's way."""

from __future__ import annotations

import math
import netrc
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from sapo_rl.config import Config
from sapo_rl.errors import first_line
from sapo_rl.run_folder import CONFIG, WANDB
from sapo_rl.telemetry.metrics import Record
from sapo_rl.telemetry.sinks.completions import COLUMNS, JSON_COLUMNS, Row

INIT_SECONDS = 20
"""How long the start may wait for the server before the run goes on offline."""
FINISH_SECONDS = 60
"""How long the end may wait for uploads; what is missing then can be sent with `wandb sync`."""
TABLES = 100
"""Tables of completions in a run, at most: W&B shows the last hundred increments of one."""


def choose_mode(setting: str, environ: Mapping[str, str], home: Path) -> str:
    """Return `online`, `offline` or `off` for `logging.wandb`.

    `auto` follows the environment variable WANDB_MODE where it is set, else is online where `environ` or the netrc
    file holds credentials for the W&B server, else offline.
    """
    if setting != "auto":
        return setting
    wished = environ.get("WANDB_MODE", "")
    if wished:
        return {"disabled": "off", "dryrun": "offline", "offline": "offline"}.get(wished, "online")
    return "online" if _has_credentials(environ, home) else "offline"


def _has_credentials(environ: Mapping[str, str], home: Path) -> bool:
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    files = [Path(environ["NETRC"])] if environ.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for file in files:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(str(file)).authenticators(host):
                return True
    return False


def open_wandb(config: Config, folder: Path, run_id: str | None, warn: Callable[[str], None]) -> WandbSink | None:
    """Start the sink that `logging.wandb` asks for; None where it is off, and then wandb is not even imported."""
    mode = choose_mode(config.logging.wandb, os.environ, Path.home())
    return None if mode == "off" else WandbSink(config, folder, run_id, mode, warn)


class WandbSink:
    """One W&B run in the run folder.

    Args:
        config: the run's config.
        folder: the run folder; its subfolder `wandb` takes all files. W&B is shown its config.yaml, without secrets.
        run_id: the id of the run that is resumed, or None for a new one.
        mode: `online` or `offline`. Online falls back to offline with a warning when the server does not answer.
        warn: takes one-line warnings.
    """

    def __init__(
        self, config: Config, folder: Path, run_id: str | None, mode: str, warn: Callable[[str], None]
    ) -> None:
        self.run_id = run_id or secrets.token_hex(4)
        self._warn = warn
        self._run: Any = _start(config, folder, self.run_id, mode, warn)
        self._where = (self._run.url or str(Path(self._run.dir).parent)) if self._run else ""
        self._table: Any = None
        self._rows = config.logging.completions
        self._steps = config.trainer.steps
        told = [name for name in COLUMNS if name not in JSON_COLUMNS]
        self._columns = [*told, *(f"rewards/{name}" for name in config.rewards)]

    @property
    def where(self) -> str:
        """Where to look at the run: its address, or the folder of its files; empty where W&B did not start."""
        return self._where

    def log(self, record: Record, rows: list[Row] | None = None) -> None:
        """Send one record under its own names, and now and then a table of some of its `rows` of completions.

        W&B's own step counter is left alone: `step` in the record is the axis of every curve, so that evaluations and
        resumed runs line up.
        """
        if self._run is None:
            return
        import wandb

        payload = {name: value for name, value in record.items() if isinstance(value, int | float)}
        try:
            if rows and self._rows and self._is_table_due(record["step"]):
                self._table = self._table or wandb.Table(columns=[*self._columns], log_mode="INCREMENTAL")
                for row in spread(rows, self._rows):
                    self._table.add_data(*(row.get(column) for column in self._columns))
                payload["completions"] = self._table
            self._run.log(payload)
        except Exception as error:  # whatever W&B does, the run goes on
            self._warn(f"W&B stopped logging ({first_line(error)}); metrics.jsonl goes on")
            self._run = None

    def finish(self, failed: bool) -> None:
        """End the run; the server gets `FINISH_SECONDS` to take what is left."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:
            self._warn(f"W&B did not finish ({first_line(error)}); `wandb sync` sends its files")
        self._run = None

    def _is_table_due(self, step: int) -> bool:
        return step % math.ceil(self._steps / TABLES) == 0 or step == self._steps


def spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return at most `count` rows, evenly spaced from the lowest reward to the highest, both ends included."""
    ranked = sorted(rows, key=lambda row: -math.inf if row["reward"] is None else row["reward"])
    if len(ranked) <= count:
        return ranked
    if count == 1:
        return ranked[-1:]
    return [ranked[round(place * (len(ranked) - 1) / (count - 1))] for place in range(count)]


def _start(config: Config, folder: Path, run_id: str, mode: str, warn: Callable[[str], None]) -> Any:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no crash reports to W&B's own service
    os.environ.setdefault("WANDB_DATA_DIR", str((folder / WANDB).absolute()))  # else tables wait in the home folder
    os.environ.setdefault("WANDB_SILENT", "true")
    (folder / WANDB).mkdir(parents=True, exist_ok=True)
    import wandb

    def init(mode: str) -> Any:
        run = wandb.init(
            project=config.logging.project,
            name=config.logging.name or folder.name,
            tags=config.logging.tags,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")),
            settings=_settings(mode),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    try:
        return init(mode)
    except Exception as error:  # whatever W&B does, the run goes on
        if mode == "offline":
            warn(f"W&B does not start: {first_line(error)}")
            return None
        warn(f"W&B is offline: {first_line(error)}. `wandb sync` sends {folder / WANDB} later")
        wandb.teardown()  # the failed start still holds the run's id
        return _start(config, folder, run_id, "offline", warn)


def _settings(mode: str) -> Any:
    """Everything off that would send or keep more than what `log` is given: console, code, machine, statistics."""
    import wandb

    return wandb.Settings(
        mode=mode,  # pyright: ignore[reportArgumentType]
        silent=True,
        console="off",
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        init_timeout=INIT_SECONDS,
        login_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
