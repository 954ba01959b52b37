"""Scoring in worker processes that can be killed.

A reward function is user code on a model's words: it may hang in C, exhaust memory or end its process. Nothing inside a
process stops all of these, so functions run in workers that are replaced when they die and killed when they are late.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType

from sapo_rl.config import RewardConfig, RewardFunctionConfig
from sapo_rl.config.reward import BATCH, key_of
from sapo_rl.errors import UserError, did_you_mean
from sapo_rl.rewards.runner.batch import Scoring
from sapo_rl.rewards.runner.scheduler import Scheduler
from sapo_rl.rewards.runner.scoring import ENVIRONMENTS, GIVEN
from sapo_rl.rewards.runner.sheet import Sheet
from sapo_rl.types import Group, Scores


class RewardPool:
    """Scores groups of samples in `cfg.workers` processes; a context manager, whose exit leaves no process behind.

    Functions are called on whole groups, those of scope `batch` on all groups of a batch. A call fails when it raises,
    returns anything but one finite number or None for each sample, takes longer than `timeout`, or takes its process
    down. Where the function does not compare samples, further calls find out which are at fault (`Blame`), and the
    others keep the value that they get alone. Failed samples end the run (`on_error: raise`), or are
    counted, and score 0 (`zero`) or leave their group (`none`).

    Groups may be submitted from any thread; a thread of the pool starts the workers and gives them calls. Whatever
    functions have started ends with the pool, also where this process is killed.

    Args:
        cfg: the functions, how many workers run them, and which secrets these see.
        log: file that takes what functions print, bounded; None leaves it to this process's stdout and stderr.
        further: functions that are called only where they are named, by their whole key in the config.
    """

    def __init__(
        self, cfg: RewardConfig, log: Path | None = None, further: Mapping[str, RewardFunctionConfig] | None = None
    ) -> None:
        self._cfg = replace(cfg, functions={**cfg.functions, **(further or {})})
        self._own = list(cfg.functions)
        self._scheduler = Scheduler(self._cfg, log)
        # The kernel ends workers with the thread that has started them: it lives as long as the pool.
        self._thread = threading.Thread(target=self._scheduler.run, name="rewards", daemon=True)
        self._needs: dict[str, list[str]] = {}
        """Columns without which a function cannot be called, by its name."""

    def __enter__(self) -> RewardPool:
        """Start the workers and wait until they have imported the functions.

        Raises:
            UserError: a function that cannot be imported, or that its `args` or `concurrency` do not suit, named; a log
                that cannot be written.
        """
        self._thread.start()
        try:
            self._needs = self._scheduler.started.result()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers; what is not scored yet fails."""
        self._scheduler.stop(RuntimeError("the pool of reward functions is closed"))
        self._thread.join()

    def check_columns(self, columns: Collection[str], source: str, names: Sequence[str] | None = None) -> None:
        """Refuse columns with which functions cannot be called; the pool has been entered.

        Args:
            columns: what prompts bring along.
            source: whose prompts, for the message.
            names: of the functions; None takes those of `cfg`.

        Raises:
            UserError: a column has the name of something else that functions are given, or one of theirs is missing.
        """
        for column in GIVEN:
            if column in columns:
                raise UserError(
                    f"{source} has a column '{column}', but under that name reward functions get what the model was "
                    "asked and wrote; rename the column"
                )
        for name in self._own if names is None else names:
            for column in self._needs.get(name, []):
                if column not in columns and column != ENVIRONMENTS:
                    raise UserError(
                        f"reward function '{name}' ({self._cfg.functions[name].function}) needs '{column}', which is "
                        f"no column of {source} and not in {key_of(name)}.args; {did_you_mean(column, columns)}"
                    )

    @property
    def asking_for_environments(self) -> list[str]:
        """The functions that ask for the environments that were played; known once the pool has been entered."""
        return [name for name, needs in self._needs.items() if ENVIRONMENTS in needs]

    def sees_environments(self, has_environment: bool) -> bool:
        """Return whether a function asks for the environments that were played; the pool has been entered.

        Raises:
            UserError: one does, and there are none.
        """
        asking = self.asking_for_environments
        if asking and not has_environment:
            raise UserError(
                f"reward function '{asking[0]}' ({self._cfg.functions[asking[0]].function}) asks for 'environments', "
                "and the run has none: set environment.name, or environments with a name each"
            )
        return bool(asking)

    def submit(self, group: Group, names: Sequence[str] | None = None) -> Future[Scores]:
        """Have a group scored; from any thread.

        Returns:
            A future of the group with `sample.rewards[name]` for every function that is named, by default those of
            `cfg`, but for those of scope `batch`, and of what happened meanwhile. It fails with a UserError on a failed
            sample of a function whose `on_error` is `raise`. To cancel it ends the calls that are under way.
        """
        return self._submit([group], names, batch=False)

    def submit_batch(self, groups: Sequence[Group], names: Sequence[str] | None = None) -> Future[Scores]:
        """Have all groups of a batch scored by the functions of scope `batch`; from any thread, as `submit`."""
        return self._submit(groups, names, batch=True)

    def scoring(self, names: Sequence[str] | None = None) -> Scoring:
        """Return what gathers the scores of a batch whose groups are finished one by one; `names` as in `submit`."""
        named = self._own if names is None else names
        return Scoring(partial(self.submit, names=named), partial(self.submit_batch, names=named), named)

    def score(self, groups: Sequence[Group]) -> Scores:
        """Return the groups with their rewards, and what happened meanwhile.

        Raises:
            UserError: a failed sample of a function whose `on_error` is `raise`; the others are given up.
        """
        with self.scoring() as scoring:
            for group in groups:
                scoring.add(group)
            return scoring.result(groups)

    def _submit(self, groups: Sequence[Group], names: Sequence[str] | None, batch: bool) -> Future[Scores]:
        named = self._own if names is None else names
        sheet = Sheet(groups, [name for name in named if (self._cfg.functions[name].scope == BATCH) is batch])
        self._scheduler.submit(sheet)
        return sheet.future
