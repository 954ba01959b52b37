"""What the page is told of a run but for its completions: numbers by step, where the time went, what happened."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sapo_rl import run_folder
from sapo_rl.run_folder.record import ENVIRONMENT
from sapo_rl.telemetry.metrics import read_metrics
from sapo_rl.telemetry.progress import Progress, Record, beside, one_line, phases
from sapo_rl.telemetry.report.packing import rounded
from sapo_rl.telemetry.report.runs import SEED, differences, experiments, labels, settings, sweep_of
from sapo_rl.telemetry.report.table import CELL, results

FILES = (run_folder.CONFIG, run_folder.OVERRIDES, ENVIRONMENT)
"""Files of a run that are shown as they are; they hold no secrets."""
RESTARTS = "rollout/engine_restarts"
NOT_CURVES = ("step", "time", "warning")


def about(runs: Sequence[Progress]) -> dict[str, Any]:
    """Return what is known of all runs together: their names, what differs between them, how far they came.

    Raises:
        UserError: a config cannot be read.
    """
    differ = differences(runs)
    alike = experiments(differ, len(runs))
    told = []
    for place, (run, name) in enumerate(zip(runs, labels(runs), strict=True)):
        config = settings(run)
        own = {key: one_line(cells[place], CELL) for key, cells in differ.items()}
        told.append(
            {
                "name": name,
                "folder": str(run.folder),
                "experiment": alike[place],
                "sweep": sweep_of(run),
                "what": ", ".join(f"{key.rpartition('.')[2]}={cell}" for key, cell in own.items() if key != SEED),
                "seed": config.get(SEED),
                "recipe": config.get("description"),
                "model": Path(str(config.get("model.path", ""))).name,
                "loss": config.get("loss.name"),
                "step": run.step,
                "total": max(run.step, config.get("trainer.steps") or 0),
                "status": status(run, config.get("trainer.steps")),
            }
        )
    return {"runs": told, "differ": differ, "results": results(runs)}


def status(run: Progress, steps: int | None) -> str:
    """Return `going on`, `complete` or `stopped`."""
    if run_folder.is_going_on(run.folder):
        return "going on"
    done = (run.folder / run_folder.FINAL).is_dir() or (steps is not None and run.step >= steps)
    return "complete" if done else "stopped"


def curves(folder: Path) -> dict[str, Any]:
    """Return a run's numbers by step, of which a metric has null where a step has none.

    Returns:
        `steps`, `times` (seconds of the run), `metrics` by name, `phases` and `beside` (seconds of each step by phase,
        as `sapo_rl.telemetry.progress` counts them), all of one length; `events` (`step`, `time`, `kind`, `text`); and
        `files`, the text of each of `FILES`.
    """
    records = read_metrics(folder / run_folder.METRICS)
    rows: dict[int, Record] = {}
    for record in records:
        if "warning" not in record:
            rows[record["step"]] = record | rows.get(record["step"], {}) | _numbers(record)
    steps = sorted(rows)
    ordered = [rows[step] for step in steps]
    return {
        "steps": steps,
        "times": [row["time"] for row in ordered],
        "metrics": _columns([_numbers(row) for row in ordered]),
        "phases": _columns([phases(row) if "time/step" in row else {} for row in ordered]),
        "beside": _columns([beside(row) for row in ordered]),
        "events": _events(records, _resumes(folder)),
        "files": {name: text for name in FILES if (text := _text(folder / name))},
    }


def _numbers(record: Record) -> Record:
    return {name: value for name, value in record.items() if name not in NOT_CURVES}


def _columns(rows: Sequence[Mapping[str, float | None]]) -> dict[str, list[float | None]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [rounded(row.get(name)) for row in rows] for name in names}


def _resumes(folder: Path) -> Iterable[int]:
    """The steps after which the run went on, of each resume that has come so far."""
    with suppress(OSError, ValueError):
        resumes = json.loads((folder / ENVIRONMENT).read_bytes()).get("resumes", [])
        return [one["after_step"] for one in resumes if "after_step" in one]
    return []


def _events(records: Sequence[Record], resumes: Iterable[int]) -> list[dict[str, Any]]:
    """Warnings, restarts of engines and resumes, in the order in which they happened."""
    found: list[dict[str, Any]] = []
    known = 0.0
    for record in records:
        place = {"step": record["step"], "time": record["time"]}
        if "warning" in record:
            found.append(place | {"kind": "warning", "text": record["warning"]})
        if (count := record.get(RESTARTS)) is not None:
            if count > known:
                engines = "an engine" if count - known == 1 else f"{count - known:.0f} engines"
                found.append(place | {"kind": "restart", "text": f"restart of {engines}"})
            known = count  # after a resume it begins anew
    for step in resumes:
        time = max((record["time"] for record in records if record["step"] <= step), default=0.0)
        found.append({"step": step, "time": time, "kind": "resume", "text": f"resumed after step {step}"})
    return sorted(found, key=lambda event: event["time"])


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""
