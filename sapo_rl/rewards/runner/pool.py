"""Scoring in worker processes that can be killed.

A reward function is user code on a model's words: it may hang in C, exhaust memory or end its process. Nothing inside a
process stops all of these, so functions run in workers that are replaced when they die and killed when they are late.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

from sapo_rl.config import RewardConfig
from sapo_rl.errors import UserError, did_you_mean
from sapo_rl.rewards.lookup import check_concurrency
from sapo_rl.rewards.runner.blame import Blame, Call, Outcome
from sapo_rl.rewards.runner.inbox import Inbox
from sapo_rl.rewards.runner.process import WorkerProcess
from sapo_rl.rewards.runner.scoring import GIVEN
from sapo_rl.rewards.runner.sheet import ScoreSheet
from sapo_rl.rewards.runner.workers import CLOSED, Workers
from sapo_rl.types import Group, Scores

logger = logging.getLogger(__name__)


class RewardPool:
    """Scores groups of samples in `cfg.workers` processes; a context manager, whose exit leaves no process behind.

    Functions are called on whole groups. A call fails when it raises, returns anything but one finite number or None
    for each sample, takes longer than `timeout`, or takes its process down. Which samples are at fault is then found by
    further calls (`Blame`): they end the run (`on_error: raise`) or score 0 and are counted (`zero`), the others keep
    the value that they get alone.

    Whatever functions have started ends with the pool, also where this process is killed. Use it in one thread at a
    time.

    Args:
        cfg: the functions, how many workers run them, and which secrets these see.
        log: file that takes what functions print, bounded; None leaves it to this process's stdout and stderr.
    """

    def __init__(self, cfg: RewardConfig, log: Path | None = None) -> None:
        self._cfg = cfg
        self._workers = Workers(cfg, log)
        self._queue: deque[Call] = deque()
        self._sheet = ScoreSheet(cfg.functions)
        self._blame = Blame({name: function.timeout for name, function in cfg.functions.items()})
        self._needs: dict[str, list[str]] = {}
        """Columns without which a function cannot be called, by its name."""

    def __enter__(self) -> RewardPool:
        """Start the workers and wait until they have imported the functions.

        Raises:
            UserError: a function that cannot be imported, or that its `args` or `concurrency` do not suit, named; a log
                that cannot be written.
        """
        try:
            self._workers.open()
            while not all(worker.ready for worker in self._workers):
                self._advance()
            for first in list(self._workers)[:1]:  # none where an environment alone rewards
                for name, function in self._cfg.functions.items():
                    check_concurrency(name, function, name in first.under_way.coroutines)
                self._needs = first.needs
        except BaseException:
            self._workers.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers."""
        self._workers.close()

    def check_columns(self, columns: Collection[str], source: str) -> None:
        """Refuse columns with which the functions cannot be called; the pool has been entered.

        Args:
            columns: what prompts bring along.
            source: whose prompts, for the message.

        Raises:
            UserError: a column has the name of something else that functions are given, or one of theirs is missing.
        """
        for column in GIVEN:
            if column in columns:
                raise UserError(
                    f"{source} has a column '{column}', but under that name reward functions get what the model was "
                    "asked and wrote; rename the column"
                )
        for name, function in self._cfg.functions.items():
            for column in self._needs.get(name, []):
                if column not in columns:
                    raise UserError(
                        f"reward function '{name}' ({function.function}) needs '{column}', which is no "
                        f"column of {source} and not in reward.functions.{name}.args; {did_you_mean(column, columns)}"
                    )

    def score(self, groups: Sequence[Group]) -> Scores:
        """Return the groups with `sample.rewards[name]` for every function of the config, and what happened meanwhile.

        Raises:
            UserError: a failed sample of a function whose `on_error` is `raise`.
        """
        for group in groups:
            self._add(group)
        return self.finish(groups)

    def follow(self, inbox: Inbox) -> None:
        """Score groups while they come in; return once the inbox is closed. `finish` gives their scores.

        Raises:
            UserError: as `score`.
        """
        with self._abandoning():
            while not inbox.connection.closed:
                if inbox.connection in self._advance(inbox) and (group := inbox.take()) is not None:
                    self._add(group)

    def finish(self, groups: Sequence[Group]) -> Scores:
        """Score what is left of `groups`, which came in since the last call in any order; return them as `score` does.

        Raises:
            UserError: as `score`.
        """
        with self._abandoning():
            while self._queue or any(worker.under_way.calls for worker in self._workers):
                self._advance()
        done, self._sheet = self._sheet, ScoreSheet(self._cfg.functions)
        return done.scores(groups)

    def _add(self, group: Group) -> None:
        self._sheet.add(group)
        if group.samples:  # else all its episodes were dropped
            self._queue.extend(Call(name, group, list(range(len(group.samples)))) for name in self._cfg.functions)

    def _advance(self, inbox: Inbox | None = None) -> list[Any]:
        """Hand out tasks, wait for the next event, here or in the inbox, and deal with it; return what was ready."""
        self._workers.fill()
        while sum(self._give_next(worker) for worker in self._workers):  # in turns, so that all get as many
            pass
        busy = [worker for worker in self._workers if worker.busy]
        soonest = min((worker.deadline for worker in busy), default=math.inf if inbox else 0.0)
        patience = None if soonest == math.inf else max(0.0, soonest - time.monotonic())
        answered = wait([*(worker.connection for worker in busy), *([inbox.connection] if inbox else [])], patience)
        for worker in busy:
            ends = worker.receive() if worker.connection in answered else []
            if not ends and time.monotonic() >= worker.deadline:
                ends = worker.overdue()
            if any(call is not None and outcome.dead for call, outcome in ends):
                self._workers.replace(worker)
            if len(ends) > 1 and ends[0][1].shared:
                cause = f"{len(ends)} calls under way ({ends[0][1].cause})"
                logger.warning("a worker for reward functions ended with %s; repeating them one at a time", cause)
            for call, outcome in ends:
                if call is None:
                    self._failed_to_start(worker, outcome)
                else:
                    self._settle(call, outcome)
        return answered

    def _give_next(self, worker: WorkerProcess) -> bool:
        """Give a worker the first call that it can take; return whether there was one."""
        names, idle = worker.room(), not worker.under_way.calls
        found = (i for i, call in enumerate(self._queue) if call.name in names and (idle or not call.alone))
        place = next(found, None) if names else None
        if place is None:
            return False
        call = self._queue[place]
        try:
            worker.send(call, self._blame.limit(call))
        except OSError:  # it died while it waited, or does not read: nobody's fault
            self._queue.extendleft(replace(one, alone=True) for one in worker.under_way.calls)
            self._workers.replace(worker)
        else:
            del self._queue[place]
        return True

    def _settle(self, call: Call, outcome: Outcome) -> None:
        if outcome.scores is not None:
            self._sheet.note(call, outcome.scores)
        verdict = self._blame.after(call, outcome)
        self._queue.extendleft(reversed(verdict.first))
        self._queue.extend(verdict.last)
        if verdict.failed is not None:
            self._fail(verdict.failed, verdict.cause)

    def _failed_to_start(self, worker: WorkerProcess, outcome: Outcome) -> None:
        cause = self._workers.with_hint(outcome.cause)
        if not outcome.dead or worker.retried:
            raise UserError(f"reward functions cannot be loaded: {cause}" if outcome.dead else cause)
        logger.warning("a worker for reward functions did not start (%s); starting another", cause)
        self._workers.replace(worker, retried=True)

    def _fail(self, call: Call, cause: str) -> None:
        cfg = self._cfg.functions[call.name]
        text = _failure(call, cfg.function, self._workers.with_hint(cause))
        if cfg.on_error == "raise":
            raise UserError(f"{text}; reward.functions.{call.name}.on_error=zero scores such samples 0")
        self._sheet.fail(call, text)

    @contextlib.contextmanager
    def _abandoning(self) -> Iterator[None]:
        """Forget what is not finished, where scoring is interrupted."""
        try:
            yield
        except BaseException as error:
            self._queue.clear()
            self._sheet = ScoreSheet(self._cfg.functions)
            self._workers.end([worker for worker in self._workers if worker.under_way.calls])
            if self._workers.closed:
                raise RuntimeError(CLOSED) from error
            raise


def _failure(call: Call, function: str, cause: str) -> str:
    index, excerpt = call.group.prompt.index, call.group.samples[call.positions[0]].text[:80]
    return (
        f"reward function '{call.name}' ({function}) failed on a completion of prompt {index}: {cause}\n"
        f"  completion: {excerpt!r}"
    )
