"""`sapo-report RUN_DIR ...`: a page to browse runs in, and a table of what differs between them.

Also as `python -m sapo_rl.telemetry.report`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sapo_rl.errors import UserError
from sapo_rl.processes import streams
from sapo_rl.run_folder import METRICS, is_going_on
from sapo_rl.telemetry.progress import Progress
from sapo_rl.telemetry.report import dashboard, page, picture
from sapo_rl.telemetry.report.runs import differences, load_all, unlinked
from sapo_rl.telemetry.report.table import show, table

PAGE = ".html"
"""The ending of a page; a file with any other is a picture."""
WATCH = 10.0
"""Seconds between two looks at the runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Show the runs named on the command line; return 2 for a mistake in it."""
    reader = parser()
    arguments = reader.parse_args(argv)
    if not arguments.runs and not arguments.wandb:
        reader.error("the following arguments are required: RUN_DIR")
    streams.prepare()
    out: Path | None = arguments.out
    watch: float | None = arguments.watch
    try:
        if arguments.wandb:
            print(f"dashboard: {dashboard.publish(arguments.wandb)}", flush=True)
        if arguments.wandb and not arguments.runs:
            return 0
        if out is not None and out.suffix != PAGE and watch is not None:
            raise UserError(f"--watch: is for a page; '{out}' of --out must end in {PAGE}")
        folders = unlinked(arguments.runs)
        runs = _first(folders, watch)
        out = out or page.unused((runs[0].folder if len(folders) == 1 else Path()) / f"report{PAGE}", runs)
        if out.suffix == PAGE:
            page.write(runs, out, arguments.megabytes, watch)
        else:
            picture.draw(runs, out, differences(runs))
        show(table(runs, differences(runs)))
        print(f"{'page' if out.suffix == PAGE else 'picture'}: {out}", flush=True)
        if watch is not None:
            _watch(folders, watch, lambda runs, live: page.write(runs, out, arguments.megabytes, live))
    except UserError as error:
        _tell(str(error))
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """Return what reads the arguments of sapo-report."""
    found = argparse.ArgumentParser("sapo-report", description=(__doc__ or "").partition("\n")[0])
    found.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR")
    found.add_argument(
        "--wandb",
        metavar="[ENTITY/]PROJECT",
        help="save a dashboard in this project of Weights & Biases (pip install 'sapo-train[dashboard]')",
    )
    found.add_argument(
        "--out",
        type=Path,
        help=f"the page, or the picture where it does not end in {PAGE}; default: report{PAGE} in the run's folder, "
        "of several runs in this folder",
    )
    found.add_argument(
        "--watch",
        nargs="?",
        type=_seconds,
        const=WATCH,
        metavar="SECONDS",
        help=f"write the page anew while the runs go on, every {WATCH:g} seconds by default; an open one follows",
    )
    found.add_argument(
        "--megabytes",
        type=_megabytes,
        default=page.MEGABYTES,
        help="of completions in the page, about, at most (default: %(default)g); of more, steps are left out, evenly",
    )
    return found


def _seconds(text: str) -> float:
    return _at_least(text, 1.0)


def _megabytes(text: str) -> float:
    return _at_least(text, 0.0)


def _at_least(text: str, least: float) -> float:
    with contextlib.suppress(ValueError):
        if least <= (number := float(text)) < float("inf"):
            return number
    raise argparse.ArgumentTypeError(f"is '{text}', must be a number of {least:g} or more")


def _first(folders: Sequence[Path], watch: float | None) -> list[Progress]:
    """Load the runs; where they are watched, wait for the first numbers of one that goes on."""
    while True:
        try:
            return load_all(folders, _tell)
        except UserError as error:
            if watch is None or not any(map(is_going_on, folders)):
                raise
            _tell(f"waiting: {error}")
            time.sleep(watch)


def _watch(folders: Sequence[Path], seconds: float, write: Callable[[list[Progress], float | None], None]) -> None:
    """Write the page whenever there are new numbers, until no run goes on, or Ctrl-C."""
    seen = None
    with contextlib.suppress(KeyboardInterrupt):
        while any(map(is_going_on, folders)):
            time.sleep(seconds)
            if seen != (seen := [_stamp(folder) for folder in folders]):
                write(load_all(folders, lambda text: None), seconds)
    write(load_all(folders, lambda text: None), None)  # an open page loads itself no more


def _stamp(folder: Path) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        found = (folder / METRICS).stat()
        return found.st_size, found.st_mtime_ns
    return 0, 0


def _tell(text: str) -> None:
    print(f"sapo-report: {text}", file=sys.stderr)
