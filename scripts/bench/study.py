"""A grid of runs: every loss under every setting and seed, side by side on the cards there are, and what came of them.

    python scripts/bench/study.py scripts/bench/study_arithmetic.yaml --folder /tmp/study/arithmetic --parallel 4 \
        --seconds 560 --out docs/bench/study_arithmetic.json

The file names a base recipe (`config`), overrides of every cell (`settings`), the losses with overrides of their own,
`axes` (config keys with the values to cross), `seeds`, and the seconds that a cell may take. A cell is a `sapo-train`
run in a folder of its own; seeds come last, so that a grid cut short has whole columns. Called again with the same
folder the grid goes on: cells that are done are passed over, one that was cut short continues from its checkpoint. A
cell has collapsed, and is stopped, where its loss is not finite, or its held-out accuracy lies below a third of its
best in two evaluations in a row. Beside the JSON stands a Parquet with a row for each cell and step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import report
import yaml
from report import ROOT
from study_results import ACCURACY, FINAL, Record, collapsed_at, rows_of, summary, table, write_parquet

sys.path.insert(0, str(ROOT))
from sapo_rl.run_folder import CHECKPOINTS, METRICS, checkpoints_in
from sapo_rl.telemetry.metrics import read_metrics

PROGRAM = (sys.executable, "-m", "sapo_rl")
CLOSING = 45.0
"""Seconds before the end at which cells are asked to stop: to finish a step and write a checkpoint."""
WORTH_STARTING = 120.0
"""Seconds that must be left for a cell to start: less would be spent on loading."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    loss: str
    axes: dict[str, Any]
    """Values by config key."""
    seed: int
    overrides: tuple[str, ...]
    """Of the command line, all of them."""

    @property
    def name(self) -> str:
        """The cell's folder."""
        parts = [f"{key.rpartition('.')[2]}-{value}" for key, value in self.axes.items()]
        return re.sub(r"[^\w.+-]", "", "_".join([self.loss, *parts, f"seed-{self.seed}"]))

    @property
    def columns(self) -> Record:
        """What tells it from others."""
        return {"cell": self.name, "loss": self.loss, **self.axes, "seed": self.seed}


def plan(grid: Mapping[str, Any], more: Sequence[str] = ()) -> list[Cell]:
    """Return the cells of a grid in the order in which they are run: all losses under all settings, seed by seed.

    Args:
        grid: what the file says.
        more: overrides of every cell, which win over the file's.

    Raises:
        ValueError: a key that a grid does not have, or none of those that it needs.
    """
    valid = {"config", "settings", "losses", "axes", "seeds", "seconds"}
    if unknown := sorted(grid.keys() - valid):
        raise ValueError(f"unknown key '{unknown[0]}'; valid: {', '.join(sorted(valid))}")
    if missing := sorted({"config", "losses"} - grid.keys()):
        raise ValueError(f"no key '{missing[0]}'")
    axes: dict[str, list[Any]] = grid.get("axes", {})
    cells = []
    for seed in grid.get("seeds", [0]):
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            for loss, own in grid["losses"].items():
                crossed = [f"{key}={value}" for key, value in chosen.items()]
                overrides = [f"config={grid['config']}", *grid.get("settings", []), *crossed, *own, f"seed={seed}"]
                cells.append(Cell(loss, chosen, seed, (*overrides, *more)))
    return cells


def run_folder(cell: Path) -> Path | None:
    """Return the folder of a cell's run, None where it has none yet."""
    found = [path.parent for path in cell.glob("runs/*/*/config.yaml") if not path.parent.is_symlink()]
    return max(found, key=os.path.getmtime, default=None)


def records_of(cell: Path) -> list[Record]:
    """Return what the cell's run has recorded so far; a last line that is half written is left out."""
    run = run_folder(cell)
    return read_metrics(run / METRICS) if run is not None and (run / METRICS).is_file() else []


def outcome(cell: Path) -> str:
    """Return how a cell ended: one of `FINAL`, `failed`, or `unfinished`."""
    file = cell / "outcome.json"
    return json.loads(file.read_text(encoding="utf-8"))["outcome"] if file.is_file() else "unfinished"


def is_complete(cell: Path, records: Sequence[Record]) -> bool:
    """Return whether the run has made all its steps and the evaluation after them."""
    run = run_folder(cell)
    if run is None:
        return False
    steps = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["trainer"]["steps"]
    return any(record["step"] == steps and ACCURACY in record for record in records)


@dataclass
class Running:
    """A cell that is being run."""

    cell: Cell
    folder: Path
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    verdict: str | None = None
    """Outcome for which it was asked to stop."""
    asked: float | None = None
    """When it was asked to stop."""

    def ask(self, verdict: str | None) -> None:
        """Have it finish its step, write a checkpoint and leave; once only: a second signal would end it at once."""
        if self.asked is None:
            self.verdict, self.asked = verdict, time.monotonic()
            self.process.terminate()

    def kill(self) -> None:
        """End it and its children now."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def watch(self, limit: float) -> None:
        """Ask it to stop where it has collapsed or had its time; kill it where it does not."""
        records = records_of(self.folder)
        spent = max(time.monotonic() - self.started, records[-1]["time"] if records else 0.0)
        if collapsed_at(records) is not None:
            self.ask("collapsed")
        elif spent > limit:
            self.ask("out of time")
        if self.asked is not None and time.monotonic() - self.asked > CLOSING:
            self.kill()

    def close(self) -> str:
        """Write down how it ended, once it has; a cell that was only cut short keeps its checkpoint and no outcome."""
        records = records_of(self.folder)
        found = self.verdict
        if is_complete(self.folder, records):
            found = "complete"
        elif found is None and collapsed_at(records) is not None:
            found = "collapsed"
        elif found is None and self.asked is None:
            found = "failed"
        if found is None:
            return "unfinished"
        (self.folder / "outcome.json").write_text(
            json.dumps({"outcome": found, "exit_code": self.process.returncode}), encoding="utf-8"
        )
        if found in FINAL and (run := run_folder(self.folder)):
            shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
        return found


def start(cell: Cell, folder: Path, card: str | None, threads: int) -> Running:
    """Start a cell on a card, with so many threads, from its checkpoint where there is one, else anew."""
    run = run_folder(folder)
    resumes = run is not None and bool(checkpoints_in(run / CHECKPOINTS))
    if not resumes:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "outcome.json").unlink(missing_ok=True)
    arguments = [f"resume={run}"] if resumes else cell.overrides
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": str(threads)} | os.environ
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    if card is not None:
        environment["CUDA_VISIBLE_DEVICES"] = card
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        command = [*PROGRAM, *arguments]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return Running(cell, folder, process)


def cards() -> list[str | None]:
    """Return the GPUs that there are, as CUDA_VISIBLE_DEVICES names them; `[None]` without any."""
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return list(named.split(","))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        return [None]
    return [str(number) for number, line in enumerate(listed) if line.startswith("GPU")] or [None]


def unfinished(cells: Sequence[Cell], folder: Path, retry: bool) -> list[Cell]:
    """Return the cells that are still to be run: with `retry` also those that failed."""
    done = FINAL if retry else (*FINAL, "failed")
    return [cell for cell in cells if outcome(folder / cell.name) not in done]


def run_all(
    cells: Sequence[Cell], folder: Path, parallel: int, limit: float, deadline: float, after: Callable[[], object]
) -> None:
    """Run the cells, `parallel` on each card, until all have ended or the deadline comes; `after` each that ends."""
    waiting = list(cells)
    slots: dict[int, Running] = {}
    places = [card for _ in range(parallel) for card in cards()]
    threads = max(1, (os.cpu_count() or 1) // len(places))
    try:
        while waiting or slots:
            left = deadline - time.monotonic()
            if left < WORTH_STARTING:
                waiting.clear()
            free = [slot for slot in range(len(places)) if slot not in slots]
            if waiting and free:  # one at a time: engines that start at once look for the same ports
                cell = waiting.pop(0)
                slots[free[0]] = start(cell, folder / cell.name, places[free[0]], threads)
                say(f"{cell.name}: started, {len(waiting)} waiting")
            for slot, one in list(slots.items()):
                one.watch(limit)
                if left < CLOSING + 5:
                    one.ask(None)
                if one.process.poll() is not None:
                    how = slots.pop(slot).close()
                    say(f"{one.cell.name}: {how} after {time.monotonic() - one.started:.0f} s")
                    if how == "failed":
                        print(
                            *(one.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-20:],
                            sep="\n",
                        )
                    after()
            time.sleep(0.5)
    finally:
        for one in slots.values():
            one.kill()


def say(text: str) -> None:
    """Print a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def collect(cells: Sequence[Cell], folder: Path, out: Path, grid: Mapping[str, Any]) -> dict[str, Any]:
    """Write what the folder holds by now, Parquet and JSON, and return the latter."""
    rows: list[Record] = []
    found: list[Record] = []
    for cell in cells:
        own = rows_of(cell.columns, records_of(folder / cell.name))
        rows += own
        found.append(summary(cell.columns, outcome(folder / cell.name), own))
    out.parent.mkdir(parents=True, exist_ok=True)
    if rows:
        write_parquet(out.with_suffix(".parquet"), rows)
    result = {**report.facts(), "grid": dict(grid), "cells": found, "table": table(found, list(grid.get("axes", {})))}
    report.write(out, result)
    return result


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="YAML")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are, and go on")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write; a Parquet goes beside it")
    parser.add_argument("--parallel", type=int, default=1, help="cells side by side on each card")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which all must have ended")
    parser.add_argument("--losses", nargs="*", help="only these of the grid's")
    parser.add_argument("--seeds", type=int, nargs="*", help="instead of the grid's")
    parser.add_argument("--axis", nargs="*", default=[], metavar="KEY=V1,V2", help="instead of the grid's, or beside")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of every cell")
    parser.add_argument("--retry", action="store_true", help="run cells again that failed")
    parser.add_argument("--dry-run", action="store_true", help="print the cells and how they stand, and stop")
    return parser.parse_args()


def main() -> None:
    """Run what is left of the grid, and write what there is after each cell."""
    args = arguments()
    deadline = time.monotonic() + args.seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # else the runs would outlive us
    grid = yaml.safe_load(args.grid.read_text(encoding="utf-8"))
    if (own := args.grid.parent / grid["config"]).is_file():  # cells run elsewhere
        grid["config"] = str(own.resolve())
    crossed = {key: yaml.safe_load(f"[{values}]") for key, values in (one.split("=", 1) for one in args.axis)}
    grid |= {"axes": grid.get("axes", {}) | crossed} | ({"seeds": args.seeds} if args.seeds else {})
    grid["losses"] = {name: own for name, own in grid["losses"].items() if not args.losses or name in args.losses}
    cells, folder = plan(grid, args.set), args.folder.resolve()
    if args.dry_run:
        for cell in cells:
            print(outcome(folder / cell.name), cell.name, *cell.overrides)
        return
    limit = grid.get("seconds", float("inf"))
    left = unfinished(cells, folder, args.retry)
    run_all(left, folder, args.parallel, limit, deadline, lambda: collect(cells, folder, args.out, grid))
    result = collect(cells, folder, args.out, grid)
    print(report.markdown(result["table"]))
    for one in result["cells"]:
        if one["outcome"] not in FINAL:
            print(f"{one['outcome']}: {one['cell']}")


if __name__ == "__main__":
    main()
