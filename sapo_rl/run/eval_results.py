"""What models came to on sets of held-out prompts: tables, `results.json`, and Parquet files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.markup import escape
from rich.table import Table

from sapo_rl.config import Config
from sapo_rl.evaluation.evaluator import rows_of
from sapo_rl.evaluation.measure import Answers, estimates, metrics, scores_of
from sapo_rl.evaluation.scores import Estimate, change
from sapo_rl.evaluation.sets import EvalSet
from sapo_rl.run.subjects import Subject
from sapo_rl.run_folder import COMPLETIONS, write_atomic
from sapo_rl.telemetry.sinks.completions import EVAL_COLUMNS, prompt_text, write_rows

RESULTS = "results.json"
"""Every number, with its interval."""
PROMPTS = "prompts.parquet"
"""The scores of each prompt, a row for each model."""
PROMPT_COLUMNS = {
    "model": pa.string(),
    "step": pa.int64(),
    "set": pa.string(),
    "prompt_index": pa.int64(),
    "prompt": pa.string(),
    "columns": pa.string(),
}
"""Columns of that file beside the scores; `columns` are the data's, as JSON."""


@dataclass(frozen=True)
class Result:
    """What one model came to."""

    label: str
    subject: Subject
    sets: list[tuple[EvalSet, Answers]]
    config: Config

    def as_json(self) -> dict[str, Any]:
        """Return its numbers by set."""
        return {
            "model": self.label,
            "path": self.subject.path,
            "step": self.subject.step,
            "sets": {
                one.name: {
                    "prompts": len(one.prompts),
                    "left_out": one.left_out,
                    "samples": one.settings.samples,
                    "estimates": _as_json(estimates(one, found)),
                    "metrics": metrics(one, found, self.config),
                }
                for one, found in self.sets
            },
        }

    def prompt_rows(self) -> Iterator[dict[str, Any]]:
        """Yield a row for each prompt of each set, with its scores."""
        for one, found in self.sets:
            scores = scores_of(one, found)
            for prompt in one.prompts:
                yield {
                    "model": self.label,
                    "step": self.subject.step,
                    "set": one.name,
                    "prompt_index": prompt.index,
                    "prompt": prompt_text(prompt.content),
                    "columns": json.dumps(prompt.columns, default=str),
                    **{name: own.get(prompt.index) for name, own in scores.items()},
                }


def save(folder: Path, results: Sequence[Result]) -> None:
    """Write all results into a folder."""
    changed = [
        {"model": one.label, "since": results[0].label, "set": name, "estimates": _as_json(numbers)}
        for one in results[1:]
        for name, numbers in changes(results[0], one).items()
    ]
    content = {"models": [one.as_json() for one in results], "changes": changed}
    write_atomic(folder / RESULTS, json.dumps(content, indent=1) + "\n")
    write_rows(folder / PROMPTS, [row for one in results for row in one.prompt_rows()], PROMPT_COLUMNS)
    for number, one in enumerate(results):
        rows = [row for each, found in one.sets for row in rows_of(each, found, one.subject.step)]
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", one.label)
        write_rows(folder / COMPLETIONS / f"{number:03d}_{name}.parquet", rows, EVAL_COLUMNS)


def changes(first: Result, other: Result) -> dict[str, dict[str, Estimate]]:
    """Return by set how the scores of a model differ from those of the first, on the prompts that both have."""
    found: dict[str, dict[str, Estimate]] = {}
    for (one, before), (_, after) in zip(first.sets, other.sets, strict=True):
        old, new = scores_of(one, before), scores_of(one, after)
        for name in [name for name in old if name in new]:
            shared = [index for index in old[name] if index in new[name]]
            if shared:
                pairs = ([scores[name][index] for index in shared] for scores in (old, new))
                found.setdefault(one.name, {})[name] = change(*pairs)
    return found


def tables(results: Sequence[Result]) -> Iterator[Table]:
    """Yield a table for each set, and where there are several models one of how they differ from the first."""
    for place, (one, _) in enumerate(results[0].sets):
        numbers = [(result.label, estimates(*result.sets[place])) for result in results]
        left_out = f", {one.left_out} left out" if one.left_out else ""
        yield _table(f"{one.name}: {len(one.prompts):,} prompts{left_out}", numbers, signed=False)
        if len(results) > 1:
            since = [(result.label, changes(results[0], result).get(one.name, {})) for result in results[1:]]
            yield _table(f"{one.name}: change since {results[0].label}", since, signed=True)


def _table(title: str, rows: Sequence[tuple[str, dict[str, Estimate]]], signed: bool) -> Table:
    names = list(dict.fromkeys(name for _, numbers in rows for name in numbers))
    title = escape(f"{title} [95% interval]")
    table = Table("", *names, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.no_wrap = True
    for label, numbers in rows:
        table.add_row(escape(label), *(escape(_cell(numbers.get(name), signed)) for name in names))
    return table


def _cell(number: Estimate | None, signed: bool) -> str:
    sign = "+" if signed else ""
    return "-" if number is None else f"{number.value:{sign}.3f} [{number.low:{sign}.3f}, {number.high:{sign}.3f}]"


def _as_json(numbers: dict[str, Estimate]) -> dict[str, Any]:
    return {name: asdict(number) for name, number in numbers.items()}
