"""`check=data`: how often the model solves the prompts of the data, before any training."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import gather_object
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from sapo_rl.advantages import has_spread, with_advantages
from sapo_rl.config import Config
from sapo_rl.data.pass_rates import fingerprint, pass_rates_of, write_pass_rates
from sapo_rl.run.writing import Rank, Writing, read_prompts, start_writing, wait_for
from sapo_rl.run_folder import PASS_RATES
from sapo_rl.telemetry import Row, rows, sample_metrics
from sapo_rl.telemetry.sinks.completions import completions_path, write_completions
from sapo_rl.types import Batch, Group, Prompt, RewardStats

BINS = 10
"""Rows of the histogram between never and always."""
WIDTH = 40
"""Characters of its longest bar."""
SHOWN = 300
"""Characters shown of a prompt or a completion."""


class Measured(NamedTuple):
    """What was found of one prompt."""

    fingerprint: str
    rows: list[Row]
    """Its samples."""
    rate: float | None
    """Its pass rate; None where the reward applied to none."""
    spread: bool
    """Whether its samples differ in what they earn."""


class Share(NamedTuple):
    """What one rank has found."""

    prompts: list[Measured]
    scoring: RewardStats
    dropped: list[str]
    """What failed in each episode that its environment has lost."""


def check_data(rank: Rank, stack: contextlib.ExitStack) -> None:
    """Have the model's own weights complete the first prompts of the data, print how often each reward is earned.

    Every completion, and the pass rate of every prompt, are written into the folder.

    Raises:
        UserError: as a run would.
    """
    config, is_main = rank.config, rank.accelerator.is_main_process
    console = Console(quiet=not is_main)
    writing = start_writing(rank, stack)
    prompts, _, dropped = read_prompts(rank, writing)
    chosen = prompts[: config.data.check.prompts]
    if dropped:
        console.print(f"{dropped} prompts are longer than data.max_prompt_tokens: they are left out", style="yellow")
    wait_for(writing.engines, rank, lambda text: console.print(text, style="dim"))
    start = time.monotonic()
    everyone: list[Share] = gather_object([_measure(rank, writing, rank.share.of(chosen), console)])
    seconds = time.monotonic() - start
    found = sorted((one for share in everyone for one in share.prompts), key=lambda one: one.rows[0]["prompt_index"])
    if not is_main:
        return
    scoring = RewardStats.together(share.scoring for share in everyone)
    for text in [*(text for share in everyone for text in share.dropped[:1]), *scoring.failures.values()]:
        console.print(f"warning: {text}", style="yellow", markup=False)
    for table in (_histogram(found), _facts(found, len(prompts), scoring, config, seconds), _examples(found)):
        console.print(table)
    _save(rank.folder, found)
    console.print(
        f"pass rates   {rank.folder / PASS_RATES}\ncompletions  {completions_path(rank.folder, 0)}", markup=False
    )


def _measure(rank: Rank, writing: Writing, own: Sequence[Prompt], console: Console) -> Share:
    """Have this rank's prompts completed and scored."""
    config = rank.config
    samples = config.data.check.samples or config.rollout.group_size
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    with bar as progress, rank.rewards.scoring() as scoring:
        task = progress.add_task("prompts", total=len(own))

        def finished(group: Group) -> None:
            scoring.add(group).add_done_callback(lambda _: progress.advance(task))

        written = writing.writer.write(own, 0, samples, on_group=finished).checked()
        scores = scoring.result(written.groups)
    batch = Batch(scores.groups, scores.stats, {}, written.usage)
    batch = with_advantages(batch, config.rewards, config.advantage, gather_object)
    rates = pass_rates_of(batch.groups, config.solving, config.data.pass_rate.solved_at)
    found = [_measured(*pair, config) for pair in zip(batch.groups, rates, strict=True) if pair[0].samples]
    return Share(found, scores.stats, list(written.dropped))


def _measured(group: Group, rate: float | None, config: Config) -> Measured:
    spread = has_spread(group, config.rewards, config.advantage.combine)
    return Measured(fingerprint(group.prompt.content), rows(0, group), rate, spread)


def _histogram(found: Sequence[Measured]) -> Table:
    rates = [one.rate for one in found if one.rate is not None]
    counts = {"never": sum(rate == 0 for rate in rates)}
    for place in range(BINS):
        counts[f"{place / BINS:.1f} to {(place + 1) / BINS:.1f}"] = sum(
            0 < rate < 1 and int(rate * BINS) == place for rate in rates
        )
    counts["always"] = sum(rate == 1 for rate in rates)
    table = Table("pass rate", "prompts", "", "", title="how often the prompts are solved", title_justify="left")
    for name, count in counts.items():
        bar = "█" * round(WIDTH * count / max(counts.values(), default=1)) if count else ""
        table.add_row(name, f"{count:,}", f"{count / max(1, len(rates)):.1%}", bar)
    return table


def _facts(found: Sequence[Measured], count: int, scoring: RewardStats, config: Config, seconds: float) -> Table:
    samples = [row for one in found for row in one.rows]
    metrics = sample_metrics([one.rows for one in found])
    rates = [one.rate for one in found if one.rate is not None]
    spread = sum(one.spread for one in found)
    facts = {
        "prompts": f"{len(found):,} of {count:,}, with {len(samples):,} samples",
        "a sample is solved": f"where {config.solving} is at least {config.data.pass_rate.solved_at:g}",
        "mean pass rate": f"{statistics.fmean(rates):.3f}" if rates else "-",
        "solved at least once": f"{sum(rate > 0 for rate in rates) / max(1, len(rates)):.1%} of the prompts",
        "teach something": f"{spread / len(found):.1%} of the prompts: their samples differ in what they earn",
    }
    for name in config.rewards:
        mean, std = (metrics.get(f"rewards/{name}/{key}") for key in ("mean", "std"))
        told = "applied to no sample" if mean is None else f"mean {mean:.4g}, deviation {std:.4g}"
        counts = [(scoring.not_applicable.get(name, 0), "not applicable"), (scoring.errors.get(name, 0), "failed")]
        facts[f"reward {name}"] = ", ".join([told, *(f"{count:,} {what}" for count, what in counts if count)])
    length, least, most = (metrics[f"completions/{key}_length"] for key in ("mean", "min", "max"))
    facts["tokens of a sample"] = f"mean {length:.1f}, {least:g} to {most:g}"
    facts["cut by the length limit"] = f"{metrics['completions/clipped_ratio']:.1%}"
    facts["time"] = f"{seconds:.1f} s, {sum(row['tokens'] for row in samples) / seconds:,.0f} tokens/s"
    table = Table(title="data", show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(escape(name), escape(value))
    return table


def _examples(found: Sequence[Measured]) -> Table:
    """A prompt that is never solved, one between, and one that always is, each with its first and its best sample."""
    kinds = {"never": lambda rate: rate == 0, "between": lambda rate: 0 < rate < 1, "always": lambda rate: rate == 1}
    table = Table("pass rate", "prompt", "completion", "rewards", title="examples", title_justify="left")
    for name, holds in kinds.items():
        for one in [one for one in found if one.rate is not None and holds(one.rate)][:1]:
            ranked = sorted(one.rows, key=lambda row: -(row["reward"] or 0.0))
            for row in [ranked[0], ranked[-1]] if name == "between" else ranked[:1]:
                table.add_row(f"{one.rate:.3g}", _short(row["prompt"]), _short(row["completion"]), rewards_of(row))
    return table


def rewards_of(row: Row) -> str:
    """Return what each reward function says of a sample, a line each."""
    named = {name.removeprefix("rewards/"): row[name] for name in row if name.startswith("rewards/")}
    return "\n".join(f"{escape(name)} {'-' if value is None else f'{value:.4g}'}" for name, value in named.items())


def _short(text: str) -> str:
    return escape(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}")


def _save(folder: Path, found: Sequence[Measured]) -> None:
    write_completions(folder, 0, [row for one in found for row in one.rows])
    saved = [_saved(one) for one in found if one.rate is not None]
    write_pass_rates(folder / PASS_RATES, {name: [one[name] for one in saved] for name in saved[0]} if saved else {})


def _saved(one: Measured) -> dict[str, Any]:
    metrics = sample_metrics([one.rows])
    named = ["reward/mean", *(f"{name}/mean" for name in one.rows[0] if name.startswith("rewards/"))]
    return {
        "fingerprint": one.fingerprint,
        "prompt_index": one.rows[0]["prompt_index"],
        "prompt": one.rows[0]["prompt"],
        "pass_rate": one.rate,
        "samples": len(one.rows),
        **{name: metrics.get(name) for name in named},
        "mean_length": metrics["completions/mean_length"],
        "clipped_ratio": metrics["completions/clipped_ratio"],
    }
