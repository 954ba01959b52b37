"""Every completion of a run, as Parquet files in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

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
    "stop": pa.string(),
    "tokens": pa.int64(),
    "length": pa.int64(),
    "turns": pa.int64(),
    "rows": pa.int64(),
    "weight_version": pa.int64(),
    "last_weight_version": pa.int64(),
}
"""Columns of `step_*.parquet`; each reward function adds `rewards/<name>`.

`tokens` counts those trained on, `length` all that follow a prompt; `stop` is a value of `sapo_rl.types.Stop`.
"""

Row: TypeAlias = dict[str, Any]
"""What is told of a sample: the keys of `COLUMNS` and `rewards/<name>`. Without its tokens, it travels light."""


def prompt_text(content: str | Messages) -> str:
    """Return a prompt for human eyes: the text itself, or the messages, a paragraph each."""
    if isinstance(content, str):
        return content
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in content)


def rows(step: int, group: Group) -> list[Row]:
    """Return what is told of the samples of a prompt."""
    prompt = prompt_text(group.prompt.content)
    return [
        {
            "step": step,
            "prompt_index": group.prompt.index,
            "prompt": prompt,
            "completion": sample.text,
            "reward": sample.reward,
            "advantage": sample.advantage,
            "stop": sample.stop.value,
            "tokens": sample.num_trained,
            "length": sum(len(row.token_ids) for row in sample.rows),
            "turns": max(1, len(sample.turns)),
            "rows": len(sample.rows),
            "weight_version": sample.versions[0],
            "last_weight_version": sample.versions[1],
            **{f"rewards/{name}": value for name, value in sample.rewards.items()},
        }
        for sample in group.samples
    ]


def completions_path(folder: Path, step: int) -> Path:
    """Return where the completions of a step lie in a run folder."""
    return folder / COMPLETIONS / f"step_{step:05d}.parquet"


def write_completions(folder: Path, step: int, samples: list[Row]) -> Path:
    """Write a step's samples to `completions/step_<step>.parquet` of a run folder; return the path."""
    rewards = dict.fromkeys(name for row in samples for name in row if name not in COLUMNS)
    schema = pa.schema({**COLUMNS, **{name: pa.float64() for name in rewards}})
    path = completions_path(folder, step)
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    pq.write_table(pa.Table.from_pylist(samples, schema), part, compression="zstd")
    part.replace(path)
    return path
