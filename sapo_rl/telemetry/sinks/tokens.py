"""What an update made of every token that it trained on, as Parquet files beside those of the completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sapo_rl.data.tables import write_table
from sapo_rl.telemetry.sinks.completions import completions_path
from sapo_rl.types import Row, TokenValues

Placed: TypeAlias = tuple[int | None, TokenValues]
"""Values with the place of their sample among the completions of the step; None for one of an earlier step."""


def tokens_path(folder: Path, step: int) -> Path:
    """Return where the tokens of a step lie in a run folder."""
    return completions_path(folder, step, "tokens")


def write_tokens(folder: Path, step: int, found: Sequence[Placed], pieces: Callable[[list[int]], list[str]]) -> Path:
    """Write `completions/tokens_<step>.parquet` of a run folder; return the path.

    A row of it is a row of a sample, in the order of the completions. `sample` is the place of the sample in
    `step_<step>.parquet`, counted from 0, null for one of an earlier step; `row` counts the rows of an episode that are
    trained on. `advantage` and `weight`, its tokens' weight in the loss, are numbers; all others are lists, with a
    value for each token after the prompt: `token_ids`, `texts`, `trained`, and float32 by the names in
    `TokenValues.columns`, null where a token is not trained on.

    Args:
        folder: the run folder.
        step: its number.
        found: of all ranks.
        pieces: cuts the text of ids into one piece for each.
    """
    ordered = sorted(found, key=lambda one: (one[0] is None, one[0], one[1].place))
    rows = [(sample, number, row, one) for sample, one in ordered for number, row in enumerate(one.rows)]
    ids = [row.token_ids for _, _, row, _ in rows]
    trained = np.concatenate([np.zeros(0, np.bool_), *(_trained(row) for _, _, row, _ in rows)])
    starts = [0, *accumulate(map(len, ids))]

    def lists(values: Any, kind: pa.DataType, mask: NDArray[np.bool_] | None = None) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(values, kind, mask=mask))

    columns = {
        "step": pa.array([step] * len(rows), pa.int64()),
        "sample": pa.array([sample for sample, _, _, _ in rows], pa.int64()),
        "row": pa.array([number for _, number, _, _ in rows], pa.int64()),
        "advantage": pa.array([one.advantage for *_, one in rows], pa.float64()),
        "weight": pa.array([one.weight for *_, one in rows], pa.float64()),
        "token_ids": lists([token for row in ids for token in row], pa.int32()),
        "texts": lists([text for row in ids for text in pieces(row)], pa.string()),
        "trained": lists(trained, pa.bool_()),
    }
    for name in ordered[0][1].columns if ordered else ():
        values = np.zeros(len(trained), np.float32)
        values[trained] = np.concatenate([one.columns[name] for _, one in ordered])
        columns[name] = lists(values, pa.float32(), ~trained)
    path = tokens_path(folder, step)
    path.parent.mkdir(exist_ok=True)
    write_table(path, pa.table(columns))
    return path


def _trained(row: Row) -> NDArray[np.bool_]:
    found = np.full(len(row.token_ids), row.loss_mask is None)
    for start, end in row.loss_mask or ():
        found[start:end] = True
    return found
