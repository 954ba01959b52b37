"""What a grid of runs came to: a row for each cell and step, a summary of each cell, and a table of means."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]

ACCURACY = "eval/reward"
LOST = 1 / 3
"""Of its best accuracy: what a run below it in `IN_A_ROW` evaluations has left."""
IN_A_ROW = 2
WORTH_LOSING = 0.1
"""Accuracy that a run must have had for its loss to count."""
FINAL = ("complete", "collapsed", "out of time")
"""Outcomes of cells that are not run again."""

NUMBERS = {
    "entropy": 3,
    "KL to the start": 4,
    "ratio min": 6,
    "ratio max": 2,
    "weight with": 3,
    "weight against": 3,
    "length": 1,
    "s/step": 2,
}
"""Columns of the table beside the accuracies, with their decimals."""


def collapsed_at(records: Sequence[Record]) -> int | None:
    """Return the step at which a run had collapsed by the rule above, None where it has not."""
    best, low = 0.0, 0
    for record in records:
        if "policy/loss" in record and None in (record["policy/loss"], record.get("policy/grad_norm", 0.0)):
            return record["step"]
        if (accuracy := record.get(ACCURACY)) is None:
            continue
        best = max(best, accuracy)
        low = low + 1 if best >= WORTH_LOSING and accuracy < LOST * best else 0
        if low == IN_A_ROW:
            return record["step"]
    return None


def rows_of(cell: Record, records: Sequence[Record]) -> list[Record]:
    """Return a row for each step of a cell: what it is, every number of the step, and whether the run had collapsed.

    `seconds` are those of the steps so far: without the start, a restart's included, and without evaluations.

    Args:
        cell: the columns that tell it from others.
        records: of its metrics.jsonl.
    """
    steps: dict[int, Record] = {}
    for record in records:
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        steps.setdefault(record["step"], {}).update(numbers)
    lost = collapsed_at(records)
    rows, seconds = [], 0.0
    for step, row in sorted(steps.items()):
        seconds += row.get("time/step", 0.0)
        rows.append({**cell, **row, "seconds": seconds, "collapsed": lost is not None and step >= lost})
    return rows


def write_parquet(path: Path, rows: Sequence[Record]) -> None:
    """Write the rows, a column for each name in any of them, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for row in rows for name in row)
    partial = path.with_suffix(".partial")
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), partial)
    os.replace(partial, path)


def summary(cell: Record, how: str, rows: Sequence[Record]) -> Record:
    """Return a cell in one row: step, seconds and accuracy of each evaluation, and what the whole run came to."""
    found: Record = {**cell, "outcome": how}
    measured = [row for row in rows if ACCURACY in row]
    if not measured:
        return found
    found["curve"] = [[row["step"], round(row["seconds"], 1), round(row[ACCURACY], 4)] for row in measured]
    found["collapsed_at"] = next((row["step"] for row in rows if row["collapsed"]), None)
    kinds: dict[str, tuple[str, Callable[[list[float]], float]]] = {
        "entropy": ("policy/entropy", lambda values: values[-1]),
        "KL to the start": ("policy/kl_ref", lambda values: values[-1]),
        "ratio min": ("policy/ratio_min", min),
        "ratio max": ("policy/ratio_max", max),
        "weight with": ("policy/weight_mean_with", statistics.fmean),
        "weight against": ("policy/weight_mean_against", statistics.fmean),
        "length": ("completions/mean_length", lambda values: values[-1]),
        "s/step": ("time/step", statistics.median),
    }
    for name, (metric, reduce) in kinds.items():
        if values := [row[metric] for row in rows if metric in row]:
            found[name] = reduce(values)
    return found


def accuracy_at(one: Record, seconds: float) -> float:
    """Return a cell's accuracy in its last evaluation by then."""
    return [accuracy for _, clock, accuracy in one["curve"] if clock <= seconds][-1]


def table(cells: Sequence[Record], axes: Sequence[str]) -> dict[str, Any]:
    """Return means and standard errors over the seeds of cells that have ended, a row for each loss and setting.

    `at equal time` is the accuracy when the quickest whole cell with the same settings had ended, in seconds of steps.
    """
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for one in cells:
        if one["outcome"] in FINAL and "curve" in one:
            groups[(*(one[axis] for axis in axes), one["loss"])].append(one)
    ends: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for key, ones in groups.items():
        ends[key[:-1]] += [one["curve"][-1][1] for one in ones if one["outcome"] != "collapsed"]
    numbers = [name for name in NUMBERS if any(name in one for ones in groups.values() for one in ones)]
    titles = [axis.rpartition(".")[2] for axis in axes]
    columns = ["loss", *titles, "seeds", "accuracy at the end", "at equal time", "best", *numbers, "collapsed"]
    rows = []
    for key, ones in sorted(groups.items(), key=lambda item: item[0][:-1]):
        at = min(ends[key[:-1]], default=float("inf"))
        accuracies = [
            spread([one["curve"][-1][2] for one in ones], 3),
            f"{spread([accuracy_at(one, at) for one in ones], 3)} at {at:.0f} s" if at < float("inf") else "",
            spread([max(point[2] for point in one["curve"]) for one in ones], 3),
        ]
        others = [spread([one[name] for one in ones if name in one], NUMBERS[name]) for name in numbers]
        lost = sum(one["outcome"] == "collapsed" for one in ones)
        rows.append([key[-1], *map(str, key[:-1]), str(len(ones)), *accuracies, *others, str(lost or "")])
    note = "Means over seeds ± standard error, of cells that have ended; a collapsed one counts with its last accuracy."
    return {"columns": columns, "rows": rows, "note": note}


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean ± standard error; the mean alone of a single value."""
    if not values:
        return ""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return f"{statistics.fmean(values):.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")
