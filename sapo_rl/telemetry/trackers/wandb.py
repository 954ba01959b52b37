"""Weights & Biases: quiet, offline when it must be."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sapo_rl.errors import first_line
from sapo_rl.run_folder import WANDB
from sapo_rl.telemetry.metrics import Record
from sapo_rl.telemetry.sinks.completions import Row
from sapo_rl.telemetry.trackers.base import TrackedRun, numbers_of

INIT_SECONDS = 20
"""How long the start may wait for the server before the run goes on offline."""
FINISH_SECONDS = 60
"""How long the end may wait for uploads; what is missing then can be sent with `wandb sync`."""


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


class WandbTracker:
    """One W&B run, whose files are in the run folder's `wandb`.

    Online falls back to offline with a warning when the server does not answer.
    """

    def __init__(self, run: TrackedRun) -> None:
        self.run_id: str | None = run.run_id or secrets.token_hex(4)
        self._run: Any = _start(run, self.run_id, choose_mode(run.logging.wandb, os.environ, Path.home()))
        self.where = self._run.url or str(Path(self._run.dir).parent)
        self._columns, self._table = run.columns, None

    def log(self, record: Record, rows: Sequence[Row]) -> None:
        """Send a record under its own names, and its completions as increments of one table.

        W&B's own step counter is left alone: `step` in the record is the axis of every curve, so that evaluations and
        resumed runs line up.
        """
        import wandb

        payload: dict[str, Any] = numbers_of(record)
        if rows:
            self._table = self._table or wandb.Table(columns=[*self._columns], log_mode="INCREMENTAL")
            for row in rows:
                self._table.add_data(*(row.get(column) for column in self._columns))
            payload["completions"] = self._table
        self._run.log(payload)

    def finish(self, failed: bool) -> None:
        """End the run; the server gets `FINISH_SECONDS` to take what is left, `wandb sync` sends the rest."""
        self._run.finish(exit_code=int(failed))


def _start(run: TrackedRun, run_id: str, mode: str) -> Any:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no crash reports to W&B's own service
    os.environ.setdefault("WANDB_DATA_DIR", str((run.folder / WANDB).absolute()))  # else tables wait in the home folder
    os.environ.setdefault("WANDB_SILENT", "true")
    (run.folder / WANDB).mkdir(parents=True, exist_ok=True)
    import wandb

    try:
        started = wandb.init(
            entity=run.logging.entity,
            project=run.logging.project,
            name=run.name,
            group=run.group,
            job_type=run.logging.job_type,
            tags=run.logging.tags,
            id=run_id,
            resume="allow",
            dir=str(run.folder),
            config=run.settings,
            settings=_settings(mode),
        )
    except Exception as error:
        if mode == "offline":
            raise
        run.warn(f"W&B is offline: {first_line(error)}. `wandb sync` sends {run.folder / WANDB} later")
        wandb.teardown()  # the failed start still holds the run's id
        return _start(run, run_id, "offline")
    started.define_metric("step")
    started.define_metric("*", step_metric="step")
    return started


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
