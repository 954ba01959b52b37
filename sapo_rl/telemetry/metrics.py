"""metrics.jsonl, the source of truth: one JSON object a record, a step or an evaluation each."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat, TypeAlias

from sapo_rl.advantages import zero_spread
from sapo_rl.errors import UserError
from sapo_rl.run_folder import write_atomic
from sapo_rl.telemetry.sinks.completions import Row
from sapo_rl.types import Stop

Record: TypeAlias = dict[str, Any]
"""`step` (int), `time` (seconds of the run so far), and metrics by name: finite numbers, None, or a warning's text."""


class MetricsLog:
    """Appends records to a file; a resumed run goes on with the clock of the records it keeps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)  # a record is one write: a signal's handler may add another
        self._started = time.monotonic()

    def keep_until(self, step: int) -> list[Record]:
        """Drop the records of later steps than `step`, and return the others.

        The clock goes on from the last record kept, so that `time` never runs backwards in the file.
        """
        self._file.close()
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        write_atomic(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self.path.open("ab", buffering=0)
        self._started = time.monotonic() - (kept[-1]["time"] if kept else 0.0)
        return kept

    def append(self, step: int, metrics: Mapping[str, SupportsFloat | str | None]) -> Record:
        """Write one record and return it; it is in the file when this returns. What is not finite becomes null."""
        record: Record = {"step": step, "time": round(time.monotonic() - self._started, 3)}
        record |= {name: _plain(value) for name, value in metrics.items()}
        self._file.write(f"{json.dumps(record)}\n".encode())
        return record

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[Record]:
    """Return the records of a metrics.jsonl; a last line that a killed run left half written is passed over.

    Raises:
        UserError: the file is missing, or another line of it is no record.
    """
    if not path.is_file():
        raise UserError(f"no file {path}; a run folder with {path.name} is wanted")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("no object with a step")
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise UserError(f"{path}:{number} is no record of a run: {error}") from error
        records.append(record)
    return records


def sample_metrics(groups: list[list[Row]]) -> dict[str, float]:
    """Return a step's `reward/*`, `rewards/<fn>/*`, `group/*`, `completions/*` and `episode/*`.

    Rewards that are None are left out; a mean of none is left out of the result. Standard deviations are over the
    samples, Bessel-corrected, 0 for a single one. Lengths are in tokens: `completions/*_length` counts those trained
    on, `episode/length` all that follow a prompt.

    Args:
        groups: a step's samples by prompt.
    """
    samples = [sample for group in groups for sample in group]
    if not samples:
        return {}
    names = dict.fromkeys(name for sample in samples for name in sample if name.startswith("rewards/"))
    found: dict[str, float] = {}
    for name in ("reward", *names):
        found |= _spread(name, [sample.get(name) for sample in samples])
    flat = zero_spread([[sample["reward"] for sample in group] for group in groups])
    lengths = [sample["tokens"] for sample in samples]
    return found | {
        "group/zero_spread_fraction": sum(flat) / len(groups),
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(sample["stop"] == Stop.LENGTH for sample in samples) / len(samples),
        "episode/length": statistics.fmean(sample["length"] for sample in samples),
    }


def _spread(prefix: str, values: list[float | None]) -> dict[str, float]:
    scored = [value for value in values if value is not None]
    if not scored:
        return {}
    std = statistics.stdev(scored) if len(scored) > 1 else 0.0
    return {f"{prefix}/mean": statistics.fmean(scored), f"{prefix}/std": std}


def _plain(value: SupportsFloat | str | None) -> float | int | str | None:
    if value is None or isinstance(value, str | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
