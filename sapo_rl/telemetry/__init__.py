"""What a run tells: metrics.jsonl, the terminal, trackers, completions on disk."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat, TypeAlias

from rich.text import Text

from sapo_rl.config import Config
from sapo_rl.data.pass_rates import write_pass_rates
from sapo_rl.run_folder import METRICS, PASS_RATES, command, resume_command
from sapo_rl.telemetry.metrics import MetricsLog, Record, read_metrics, sample_metrics
from sapo_rl.telemetry.progress import Progress
from sapo_rl.telemetry.sinks.completions import Row, rows, write_completions, write_eval_completions
from sapo_rl.telemetry.sinks.console import Display, open_display
from sapo_rl.telemetry.sinks.tokens import Placed, tokens_path, write_tokens
from sapo_rl.telemetry.summary import summary
from sapo_rl.telemetry.timers import Timers
from sapo_rl.telemetry.trackers import Trackers

__all__ = ["Record", "Row", "Telemetry", "Timers", "read_metrics", "rows", "sample_metrics"]

Metrics: TypeAlias = Mapping[str, SupportsFloat | None]


class Telemetry:
    """The one object that the loop reports to; on ranks other than 0 every method does nothing.

    Steps count from 1; what is measured before the first is step 0. Every number that is shown anywhere is in
    metrics.jsonl under the same name.

    Args:
        config: the run's config.
        folder: the run folder.
        is_main: whether this is rank 0.
        resume_step: the last step of the checkpoint that is resumed; records of later steps are dropped. None starts
            anew, without any records.
        header: what the terminal says about the run besides model and loss, e.g. the device.
        pieces: cuts the text of token ids into one for each; needed where a step has values of tokens.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        is_main: bool = True,
        resume_step: int | None = None,
        header: Mapping[str, object] | None = None,
        pieces: Callable[[list[int]], list[str]] | None = None,
    ) -> None:
        self._open = is_main
        if not is_main:
            return
        self._folder, self._pieces = folder, pieces
        about = {"model": Path(config.model.path).name, "loss": config.loss.name, **(header or {})}
        self._progress = Progress(folder, config.trainer.steps, {key: str(value) for key, value in about.items()})
        self._progress.resumed_after = resume_step or 0
        self._log = MetricsLog(folder / METRICS)
        kept = self._log.keep_until(-1 if resume_step is None else resume_step)
        for record in kept:
            self._progress.add(record)
        self._examples: list[tuple[str, str]] = []
        self._display: Display = open_display(config.logging.console)
        self._trackers = Trackers(config, folder, resume_step, self.warn)
        self._display.start(self._progress)
        lost = set(range(1, self._progress.resumed_after + 1)) - {record["step"] for record in kept}
        if lost:
            of_all = f"{len(lost)} of the {self._progress.resumed_after} steps"
            self.warn(f"{folder / METRICS} has no record of {of_all} that were made before this resume")

    def record(self, step: int, metrics: Metrics) -> None:
        """Record numbers that belong to no step's or evaluation's line, such as a probe's."""
        if self._open:
            self._record(step, metrics)

    def log_step(self, step: int, metrics: Metrics, groups: list[list[Row]], tokens: Sequence[Placed] = ()) -> None:
        """Record a step.

        Args:
            step: its number, from 1.
            metrics: numbers by name: `sample_metrics(groups)`, the updates' statistics, `Timers.take()`.
            groups: the step's samples of all ranks, by prompt; all are written to the run folder.
            tokens: values of their tokens, which are written there as well.
        """
        if not self._open:
            return
        samples = [row for group in groups for row in group]
        write_completions(self._folder, step, samples)
        tokens_path(self._folder, step).unlink(missing_ok=True)  # of the step before a resume
        if self._pieces and tokens:
            write_tokens(self._folder, step, tokens, self._pieces)
        self._progress.sample = samples[-1] if samples else None
        self._record(step, metrics, samples)
        self._display.step(self._progress)

    def log_eval(
        self, step: int, metrics: Metrics, examples: list[tuple[str, str]], samples: Sequence[Row] = ()
    ) -> None:
        """Record an evaluation after `step` steps.

        Args:
            step: 0 before the first step.
            metrics: by names that begin with `eval/`.
            examples: (prompt, greedy completion) pairs, of which `finish` shows the last ones.
            samples: all completions of the held-out prompts, of all ranks; they are written to the run folder.
        """
        if not self._open:
            return
        if samples:
            write_eval_completions(self._folder, step, list(samples))
        self._examples = examples
        self._record(step, metrics)
        self._display.evaluated(self._progress)

    def keep_pass_rates(self, columns: Callable[[], Mapping[str, Sequence[Any]]]) -> None:
        """Write how often each prompt is solved to `pass_rates.parquet` of the run folder; `columns` looks it up."""
        if self._open:
            write_pass_rates(self._folder / PASS_RATES, columns())

    def warn(self, text: str) -> None:
        """Show a warning, and keep it as a record `{"step", "time", "warning"}`."""
        if self._open:
            self._log.append(self._progress.step, {"warning": text})
            self._display.show(Text(f"warning: {text}", style="yellow"))

    def note(self, text: str) -> None:
        """Show what the run is doing, without keeping it."""
        if self._open:
            self._display.show(Text(text, style="dim"))

    def finish(self, complete: bool, before: list[tuple[str, str]]) -> None:
        """End the run and show before and after, where everything lies, and a command to try next.

        Args:
            complete: whether all steps are done; if not, and there is a checkpoint, the command continues the run.
            before: (prompt, greedy completion) pairs of the first evaluation.
        """
        if not self._open:
            return
        tracked = self._trackers.where
        report = f"{command('sapo-report', 'sapo_rl.telemetry.report')} {shlex.quote(str(self._folder))}"
        following = (not complete and resume_command(self._folder)) or report
        self.close(failed=not complete)
        self._display.show(summary(self._progress, before, self._examples, tracked, following))

    def close(self, failed: bool = False) -> None:
        """Give the terminal back and end the run in its trackers; harmless when called again."""
        if not self._open:
            return
        self._trackers.finish(failed)
        self._open = False
        self._display.close()
        self._log.close()

    def _record(self, step: int, metrics: Metrics, samples: Sequence[Row] = ()) -> None:
        record = self._log.append(step, metrics)
        self._progress.add(record)
        self._trackers.log(record, samples)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)
