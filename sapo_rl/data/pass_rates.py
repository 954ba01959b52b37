"""How often a prompt is solved: pass rates of groups, and files of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from sapo_rl.types import Messages

FILE = "pass_rates.parquet"
"""Name of a file of pass rates: a row a prompt, with at least the columns `fingerprint`, `pass_rate` and `samples`."""


def pass_rate(rewards_G: Iterable[float | None], solved_at: float) -> float | None:
    """Return the share of a prompt's samples whose reward is at least `solved_at`; None where none has a reward.

    Example:
        >>> pass_rate([1.0, 0.0, None, 1.0, 0.0], solved_at=1.0)
        0.5
    """
    known = [reward for reward in rewards_G if reward is not None]
    return sum(reward >= solved_at for reward in known) / len(known) if known else None


def fingerprint(content: str | Messages) -> str:
    """Return what tells a prompt from others whatever its place in the data: a checksum of what the model is asked."""
    return xxhash.xxh3_64_hexdigest(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def write_pass_rates(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, all with the same columns, as a Parquet file; whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    part = path.with_name(f".{path.name}.part")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), part, compression="zstd")
    part.replace(path)
