"""`check=rewards`: what the reward functions say of given completions. No model runs, only its tokenizer is read."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from sapo_rl.config import Config, DataConfig
from sapo_rl.data import load_rows
from sapo_rl.data.prompts import columns_of, content_of, with_all_columns
from sapo_rl.data.tables import read_file
from sapo_rl.errors import UserError
from sapo_rl.errors.files import parse_json
from sapo_rl.policy.model import load_tokenizer
from sapo_rl.rewards import RewardPool
from sapo_rl.run.sampling_checks import COMPLETIONS
from sapo_rl.telemetry.sinks.completions import prompt_text
from sapo_rl.types import Group, Prompt, Row, Sample, Scores, Stop

COMPLETION, INDEX = "completion", "prompt_index"
"""The columns with what the model wrote, and with the row of the data that it answers."""
SHOWN = 120
"""Characters shown of a prompt or a completion, and completions that are shown."""


class Given(NamedTuple):
    """A row of the file."""

    prompt: Prompt
    completion: str | list[dict[str, Any]]
    """Text, or all messages after the prompt."""


def check_rewards(config: Config) -> None:
    """Print what each reward function says of each completion in `data.check.completions`, and on which it failed.

    Rows that follow each other with the same prompt are one group, as a function of scope `group` sees them. What
    functions print is shown.

    Raises:
        UserError: naming the row: no completion, no prompt, no such row of the data; a function that asks for
            `environments`; or as a run would.
    """
    given = read_given(config)
    tokenizer = load_tokenizer(config.model)
    groups = [
        Group(same[0].prompt, [_sample(one, tokenizer) for one in same])
        for _, members in itertools.groupby(given, key=lambda one: (one.prompt.content, one.prompt.columns))
        if (same := list(members))
    ]
    with RewardPool(config.reward) as pool:
        pool.check_columns(given[0].prompt.columns, f"'{config.data.check.completions}'")
        for name in pool.asking_for_environments:
            raise UserError(
                f"reward function '{name}' ({config.reward.functions[name].function}) asks for 'environments', and "
                f"given completions have none: leave it out, '~reward.functions.{name}', or take check=data"
            )
        scores = pool.score(groups)
    console = Console()
    console.print(_table(scores, list(config.reward.functions)))
    for name, text in scores.stats.failures.items():
        console.print(f"warning: {text} (reward {name}: {scores.stats.errors[name]})", style="yellow", markup=False)


def read_given(config: Config) -> list[Given]:
    """Return the rows of `data.check.completions`.

    One with `prompt_index` answers that row of the data, another has the columns of the data itself.

    Raises:
        UserError: naming the row.
    """
    path = config.data.check.completions
    rows = dict(enumerate(read_file(COMPLETIONS, path)))
    if not rows:
        raise UserError(f"{COMPLETIONS}: '{path}' has no rows")
    completions = {number: _completion(row, f"'{path}': row {number}") for number, row in rows.items()}
    asked = _of_the_data(config, rows) if INDEX in rows[0] else _of_their_own(config.data, rows)
    return [Given(asked[number], completion) for number, completion in completions.items()]


def _completion(row: dict[str, Any], where: str) -> str | list[dict[str, Any]]:
    """What the model wrote; in a run's file the messages of an episode are JSON in a column of their own."""
    if "greedy" in row:
        raise UserError(f"{where} answers a held-out prompt; take completions of a step, step_*.parquet")
    said = row.get("messages") if INDEX in row else None
    completion = row.get(COMPLETION) if said is None else parse_json(said, where)
    if not isinstance(completion, str | list):
        raise UserError(f"{where} has no column '{COMPLETION}' with a text or messages in it")
    return completion


def _of_the_data(config: Config, rows: dict[int, dict[str, Any]]) -> dict[int, Prompt]:
    data, _ = load_rows(config.data, config.eval.prompts)
    data = with_all_columns(data, config.data)
    found = {}
    for number, row in rows.items():
        if row.get(INDEX) not in data:
            raise UserError(
                f"'{config.data.check.completions}': row {number} has {INDEX} {row.get(INDEX)}, which is no row that "
                f"the data has to train on ({len(data):,} rows, up to {max(data)})"
            )
        found[number] = _prompt(data[row[INDEX]], row[INDEX], config.data)
    return found


def _of_their_own(cfg: DataConfig, rows: dict[int, dict[str, Any]]) -> dict[int, Prompt]:
    rows = {number: {key: value for key, value in row.items() if key != COMPLETION} for number, row in rows.items()}
    try:
        return {number: _prompt(row, number, cfg) for number, row in with_all_columns(rows, cfg).items()}
    except UserError as error:
        needs = f"its rows need the columns that the data has, or '{INDEX}', the number of a row of it"
        raise UserError(f"{COMPLETIONS}: '{cfg.check.completions}': {error}\n  {needs}") from error


def _prompt(row: dict[str, Any], number: int, cfg: DataConfig) -> Prompt:
    return Prompt(number, [], content_of(row, number, cfg), columns_of(row, cfg))


def _sample(one: Given, tokenizer: PreTrainedTokenizerBase) -> Sample:
    messages = one.completion if isinstance(one.completion, list) else None
    text = "\n".join(str(message.get("content")) for message in messages) if messages else str(one.completion)
    token_ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
    return Sample([Row([], token_ids)], Stop.STOP, (0, 0), text=text, messages=messages)


def _table(scores: Scores, names: Sequence[str]) -> Table:
    pairs = [(group.prompt, sample) for group in scores.groups for sample in group.samples]
    further = dict.fromkeys(name for _, sample in pairs for name in sample.rewards if "/" in name)
    columns = [*names, *further]
    title = f"{len(pairs):,} completions" + (f", of which {SHOWN} are shown" if len(pairs) > SHOWN else "")
    table = Table("prompt", "completion", *map(escape, columns), title=title, title_justify="left", show_footer=True)
    for prompt, sample in pairs[:SHOWN]:
        values = [_number(sample.rewards.get(name)) for name in columns]
        table.add_row(_short(prompt_text(prompt.content)), _short(sample.text), *values)
    table.columns[1].footer = "mean"
    for column, name in zip(table.columns[2:], columns, strict=True):
        known = [value for _, sample in pairs if (value := sample.rewards.get(name)) is not None]
        column.footer = _number(statistics.fmean(known) if known else None)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _short(text: str) -> str:
    return escape(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}")
