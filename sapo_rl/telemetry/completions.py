"""Every completion of a run, as Parquet files in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sapo_rl.run_folder import COMPLETIONS
from sapo_rl.types import Group, Messages

COLUMNS = {
    "step": pa.int64(),
    "prompt_index": pa.int64(),
    "prompt": pa.string(),
    "completion": pa.string(),
    "reward": pa.float64(),
    "advantage": pa.float64(),
    "truncated": pa.bool_(),
    "tokens": pa.int64(),
    "weight_version": pa.int64(),
}
"""Columns of `step_*.parquet`; each reward function adds `rewards/<name>`."""


def prompt_text(content: str | Messages) -> str:
    """Return a prompt for human eyes: the text itself, or the messages, a paragraph each."""
    if isinstance(content, str):
        return content
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in content)


def rows(step: int, groups: list[Group]) -> list[dict[str, Any]]:
    """Return a dictionary a sample, with the keys of `COLUMNS` and `rewards/<name>`."""
    return [
        {
            "step": step,
            "prompt_index": group.prompt.index,
            "prompt": prompt_text(group.prompt.content),
            "completion": sample.text,
            "reward": sample.reward,
            "advantage": sample.advantage,
            "truncated": sample.truncated,
            "tokens": len(sample.token_ids),
            "weight_version": sample.weight_version,
            **{f"rewards/{name}": value for name, value in sample.rewards.items()},
        }
        for group in groups
        for sample in group.samples
    ]


def write_completions(folder: Path, step: int, groups: list[Group]) -> Path:
    """Write a step's samples, a row each, to `completions/step_<step>.parquet` of a run folder; return the path."""
    names = dict.fromkeys(name for group in groups for sample in group.samples for name in sample.rewards)
    schema = pa.schema({**COLUMNS, **{f"rewards/{name}": pa.float64() for name in names}})
    path = folder / COMPLETIONS / f"step_{step:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    pq.write_table(pa.Table.from_pylist(rows(step, groups), schema), part, compression="zstd")
    part.replace(path)
    return path
