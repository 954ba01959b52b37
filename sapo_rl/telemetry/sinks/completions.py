"""Every completion of a run, as Parquet files in the run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from sapo_rl.data.tables import write_table
from sapo_rl.run_folder import COMPLETIONS
from sapo_rl.types import Group, Messages, Sample

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
    "columns": pa.string(),
    "prompt_messages": pa.string(),
    "messages": pa.string(),
    "info": pa.string(),
    "conversations": pa.string(),
}
"""Columns of `step_*.parquet`; each reward function adds `rewards/<name>`.

`tokens` counts those trained on, `length` all that follow a prompt; `stop` is a value of `sapo_rl.types.Stop`. The last
five are JSON: the data's other columns, such as the answer; the messages of the prompt, with what an environment's
`reset` added, null where it is a text; the messages after it, calls of tools included, null for one turn; what an
environment tells of the episode; and all conversations of an agent that had several, `prompt` and `messages` of each.
"""
JSON_COLUMNS = ("columns", "prompt_messages", "messages", "info", "conversations")
EVAL_COLUMNS = {**COLUMNS, "set": pa.string(), "greedy": pa.bool_()}
"""Columns of `eval_*.parquet`: `set` names the held-out prompts, `reward` is what `eval/reward` is the mean of."""

Row: TypeAlias = dict[str, Any]
"""What is told of a sample: the keys of `COLUMNS` and `rewards/<name>`. Without its tokens, it travels light."""


def prompt_text(content: str | Messages) -> str:
    """Return a prompt for human eyes: the text itself, or the messages, a paragraph each."""
    if isinstance(content, str):
        return content
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in content)


def rows(step: int, group: Group) -> list[Row]:
    """Return what is told of the samples of a prompt."""
    content, columns = group.prompt.content, _json(group.prompt.columns)
    prompt, chat = prompt_text(content), None if isinstance(content, str) else _json(content)
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
            "columns": columns,
            "prompt_messages": chat if sample.opening is None else _json(sample.opening),
            "messages": None if sample.messages is None else _json(sample.messages),
            "info": _json(sample.info) if sample.info else None,
            "conversations": _conversations(sample),
            **{f"rewards/{name}": value for name, value in sample.rewards.items()},
        }
        for sample in group.samples
    ]


def eval_rows(step: int, groups: Sequence[Group], name: str, judge: str, greedy: bool) -> list[Row]:
    """Return what is told of the completions of held-out prompts.

    Args:
        step: after which they were written.
        groups: with rewards.
        name: of the set of prompts.
        judge: the reward of which `eval/reward` is the mean.
        greedy: whether each token is the likeliest.
    """
    return [
        row | {"reward": sample.rewards.get(judge), "advantage": None, "set": name, "greedy": greedy}
        for group in groups
        for row, sample in zip(rows(step, group), group.samples, strict=True)
    ]


def completions_path(folder: Path, step: int, kind: str = "step") -> Path:
    """Return where the completions of a step, or those of the evaluation after it (`eval`), lie in a run folder."""
    return folder / COMPLETIONS / f"{kind}_{step:05d}.parquet"


def write_completions(folder: Path, step: int, samples: list[Row]) -> Path:
    """Write a step's samples to `completions/step_<step>.parquet` of a run folder; return the path."""
    return write_rows(completions_path(folder, step), samples, COLUMNS)


def write_eval_completions(folder: Path, step: int, samples: list[Row]) -> Path:
    """Write those of the evaluation after a step to `completions/eval_<step>.parquet`; return the path."""
    return write_rows(completions_path(folder, step, "eval"), samples, EVAL_COLUMNS)


def write_rows(path: Path, found: list[Row], columns: dict[str, pa.DataType]) -> Path:
    """Write rows as a Parquet file, whole or not at all; what is not among `columns` is a number. Return the path."""
    numbers = dict.fromkeys(name for row in found for name in row if name not in columns)
    schema = pa.schema({**columns, **{name: pa.float64() for name in numbers}})
    path.parent.mkdir(exist_ok=True)
    write_table(path, pa.Table.from_pylist(found, schema))
    return path


def _conversations(sample: Sample) -> str | None:
    told = [{"prompt": prompt, "messages": messages} for prompt, messages in sample.conversations]
    return _json(told) if told else None


def _json(value: Any) -> str:
    return json.dumps(value, default=str)  # a column may hold what JSON does not know, such as a date
