"""What the page is told of a run's completions: a small index of all, and a chunk a step with the words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sapo_rl.run_folder import COMPLETIONS
from sapo_rl.telemetry.progress import Progress, one_line
from sapo_rl.telemetry.report.packing import packed, rounded

SHOWN = 600
"""Characters of a prompt in the index, by which prompts are searched."""
PROMPT = ("prompt_index", "prompt", "prompt_messages", "columns")
"""Columns that the completions of a prompt share."""
INDEXED = ("prompt_index", "reward", "advantage", "tokens", "turns", "stop", "set", "greedy")
"""Columns by which completions are filtered without reading any of them."""
_NAME = re.compile(r"(step|eval|tokens)_(\d+)\.parquet")
_OF_SAMPLE = ("step", "sample", "row", "advantage", "weight", "token_ids", "trained")
"""Columns of `tokens_*.parquet` that the page has already, or does not show."""
DIGITS = 4
"""Of a token's numbers."""


@dataclass(frozen=True)
class File:
    """One Parquet file of a run's completions."""

    path: Path
    kind: str
    """`step`, `eval` or `tokens`."""
    step: int
    size: int
    changed: int
    """Nanoseconds; with the size it tells a file that was written again."""


def files_of(run: Progress) -> list[File]:
    """Return the files of the run's steps and evaluations, in their order; others are left from before a resume."""
    steps, evals = ({record["step"] for record in records} for records in (run.steps, run.evals))
    known = {"step": steps, "eval": evals, "tokens": steps}
    found = []
    for path in (run.folder / COMPLETIONS).glob("*.parquet"):
        match = _NAME.fullmatch(path.name)
        if match and int(match[2]) in known[match[1]]:
            found.append(File(path, match[1], int(match[2]), path.stat().st_size, path.stat().st_mtime_ns))
    return sorted(found, key=lambda file: (file.kind, file.step))


def thinned(files: Sequence[File], budget: float) -> list[File]:
    """Return as many of the files, evenly over the steps and with the first and the last, as take `budget` bytes."""
    size = sum(file.size for file in files)
    keep = len(files) if size <= budget else max(2, int(len(files) * budget / size))
    if keep >= len(files):
        return list(files)
    return [files[round(place * (len(files) - 1) / (keep - 1))] for place in range(keep)]


@dataclass(frozen=True)
class Words:
    """The completions of one file."""

    count: int
    index: dict[str, list[Any]]
    """`INDEXED` columns."""
    prompts: dict[int, str]
    """The beginning of each prompt, by its number in the data."""
    chunk: str
    """All of them, packed: `prompts` (`text`, `messages`, `columns`) and `rows` (`prompt` among these, `group`,
    `completion`, `messages`, `info`, `conversations`, `rewards`)."""


@cache
def read(file: File) -> Words:
    """Read a file of completions, one of an earlier version included; a file that is asked for again is not read."""
    table = pq.read_table(file.path)
    columns = {name: table[name].to_pylist() for name in table.column_names}
    nothing = [None] * table.num_rows
    asked = list(zip(*(columns.get(name, nothing) for name in PROMPT), strict=True))
    prompts = {one: number for number, one in enumerate(dict.fromkeys(asked))}
    told = [{"text": text, "messages": _parsed(said), "columns": _parsed(row)} for _, text, said, row in prompts]
    rewards = {name.removeprefix("rewards/"): columns[name] for name in columns if name.startswith("rewards/")}
    groups = accumulate(int(one[0] != before[0]) for before, one in pairwise([asked[0], *asked])) if asked else ()
    said = zip(
        *(columns.get(name, nothing) for name in ("completion", "messages", "info", "conversations")), strict=True
    )
    rows = [
        {
            "prompt": prompts[one],
            "group": group,
            "completion": completion,
            "messages": _parsed(messages),
            "info": _parsed(info),
            "conversations": _parsed(conversations),
            "rewards": {name: rounded(values[place]) for name, values in rewards.items()},
        }
        for place, (one, group, (completion, messages, info, conversations)) in enumerate(
            zip(asked, groups, said, strict=True)
        )
    ]
    index = {name: [rounded(value) for value in columns[name]] for name in INDEXED if name in columns}
    shown = {number: one_line(text or "", SHOWN) for number, text, *_ in prompts}
    return Words(table.num_rows, index, shown, packed({"prompts": told, "rows": rows}))


@cache
def read_tokens(file: File) -> str:
    """Return the tokens of a step, packed: by the place of a completion among those of the step, a list of its rows.

    Each row has the lists of the file, `texts` and the numbers, null where a token is not trained on.
    """
    table = pq.read_table(file.path)
    found: dict[int, list[dict[str, Any]]] = {}
    for row in table.drop_columns([name for name in _OF_SAMPLE if name != "sample"]).to_pylist():
        sample = row.pop("sample")
        if sample is not None:
            lists = {name: [rounded(value, DIGITS) for value in values] for name, values in row.items()}
            found.setdefault(sample, []).append(lists)
    return packed(found)


@dataclass
class Index:
    """What is known of all completions of a kind, so that they are filtered without reading them."""

    steps: list[int] = field(default_factory=list)
    """Of the files."""
    counts: list[int] = field(default_factory=list)
    """Completions in each."""
    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in INDEXED})
    prompts: dict[int, str] = field(default_factory=dict)

    def add(self, step: int, words: Words) -> None:
        """Append the completions of a file."""
        self.steps.append(step)
        self.counts.append(words.count)
        self.prompts |= words.prompts
        for name, values in self.columns.items():
            values += words.index.get(name, [None] * words.count)

    def told(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {"steps": self.steps, "counts": self.counts, "prompts": self.prompts, **self.columns}


def _parsed(text: str | None) -> Any:
    """JSON that a run has written; NaN, which a browser does not know, is null."""
    return None if text is None else json.loads(text, parse_constant=lambda _: None)
