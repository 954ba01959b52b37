"""Which worker makes which call, in one thread; and what becomes of calls that fail."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

from sapo_rl.config import RewardConfig
from sapo_rl.config.reward import BATCH, key_of
from sapo_rl.errors import UserError
from sapo_rl.rewards.lookup import check_concurrency
from sapo_rl.rewards.runner.blame import Blame, Call, Outcome
from sapo_rl.rewards.runner.process import WorkerProcess
from sapo_rl.rewards.runner.sheet import Sheet
from sapo_rl.rewards.runner.workers import Workers

logger = logging.getLogger(__name__)


class Scheduler:
    """Has workers make the calls that sheets ask for. `run` is its thread; the other methods are for any.

    Args:
        cfg: the functions, how many workers run them, and which secrets these see.
        log: file that takes what functions print; None leaves it to this process's stdout and stderr.
    """

    def __init__(self, cfg: RewardConfig, log: Path | None) -> None:
        self.started: Future[dict[str, list[str]]] = Future()
        """Gets, once the functions are imported, the columns without which each cannot be called."""
        self._cfg = cfg
        self._workers = Workers(cfg, log)
        self._blame = Blame(cfg.functions)
        self._queue: deque[Call] = deque()
        self._paused: list[Call] = []
        """Calls that are made again later."""
        self._sheets: set[Sheet] = set()
        self._asked: deque[Callable[[], None]] = deque()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._end: BaseException | None = None
        """Why nothing more is scored."""

    def submit(self, sheet: Sheet) -> None:
        """Score what a sheet asks for; to cancel its future ends that."""
        with self._lock:
            end = self._end
            if end is None:
                self._sheets.add(sheet)
                self._ask(partial(self._add, sheet))
        if end is not None:
            sheet.give_up(end)
            return
        sheet.future.add_done_callback(lambda _: self._sheets.discard(sheet))
        sheet.future.add_done_callback(lambda future: future.cancelled() and self._tell(partial(self._abandon, sheet)))

    def stop(self, error: BaseException) -> None:
        """Have `run` return soon, and fail with `error` what is not finished."""

        def stop() -> None:
            raise error

        self._tell(stop)

    def run(self) -> None:
        """Score what is submitted, until `stop` or until functions cannot be loaded any more."""
        try:
            self._start()
            while True:
                self._advance()
        except BaseException as error:  # whatever it is, those who wait for scores must learn of it
            with self._lock:
                self._end = error
            self._workers.close()
            os.close(self._bell)
            if not self.started.done():
                self.started.set_exception(error)
            for sheet in [*self._sheets]:
                sheet.give_up(error)

    def _ask(self, work: Callable[[], None]) -> None:
        self._asked.append(work)
        os.eventfd_write(self._bell, 1)

    def _tell(self, work: Callable[[], None]) -> None:
        """Have `run` do something, where it still goes on."""
        with self._lock:
            if self._end is None:
                self._ask(work)

    def _start(self) -> None:
        self._workers.open()
        while not all(worker.ready for worker in self._workers):
            self._advance()
        needs: dict[str, list[str]] = {}
        for first in list(self._workers)[:1]:  # none where an environment alone rewards
            for name, function in self._cfg.functions.items():
                check_concurrency(name, function, name in first.under_way.coroutines)
            needs = first.needs
        self.started.set_result(needs)

    def _add(self, sheet: Sheet) -> None:
        everyone = [place for places in sheet.places for place in places]
        batch = [name for name in sheet.names if self._cfg.functions[name].scope == BATCH]
        others = [name for name in sheet.names if name not in batch]
        calls = [Call(name, sheet, places) for places in sheet.places if places for name in others]
        calls += [Call(name, sheet, everyone) for name in batch if everyone]
        sheet.open = len(calls)
        self._queue.extend(calls)
        if not calls:  # no function, or all its episodes were dropped
            sheet.finish()

    def _abandon(self, sheet: Sheet) -> None:
        """Make no more calls for a sheet, and end those that are under way; others in their workers are repeated."""
        self._queue = deque(call for call in self._queue if call.sheet is not sheet)
        self._paused = [call for call in self._paused if call.sheet is not sheet]
        for worker in [*self._workers]:
            calls = worker.under_way.calls
            if any(call.sheet is sheet for call in calls):
                self._queue.extendleft(call for call in reversed(calls) if call.sheet is not sheet)
                self._workers.replace(worker)

    def _advance(self) -> None:
        """Hand out calls, wait for the next event, and deal with it."""
        self._workers.fill()
        now = time.monotonic()
        self._queue.extendleft(call for call in self._paused if call.not_before <= now)
        self._paused = [call for call in self._paused if call.not_before > now]
        while sum(self._give_next(worker) for worker in self._workers):  # in turns, so that all get as many
            pass
        busy = [worker for worker in self._workers if worker.busy]
        times = [*(worker.deadline for worker in busy), *(call.not_before for call in self._paused)]
        soonest = min(times, default=math.inf)
        patience = None if soonest == math.inf else max(0.0, soonest - time.monotonic())
        answered = wait([*(worker.connection for worker in busy), self._bell], patience)
        for worker in busy:
            if worker in self._workers:  # else it has ended with a sheet that was given up
                self._look_at(worker, worker.connection in answered)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        while self._asked:
            self._asked.popleft()()

    def _look_at(self, worker: WorkerProcess, answered: bool) -> None:
        ends = worker.receive() if answered else []
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
            elif not call.sheet.future.done():  # else it was given up
                self._settle(call, outcome)

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
        sheet = call.sheet
        if outcome.scores is not None:
            for place, value in zip(call.places, outcome.scores, strict=True):
                place.note(call.name, value)
        verdict = self._blame.after(call, outcome)
        self._queue.extendleft(reversed(verdict.first))
        self._queue.extend(verdict.last)
        self._paused.extend(verdict.retry)
        sheet.open += len(verdict.first) + len(verdict.last) + len(verdict.retry) - 1
        if verdict.failed is not None:
            self._fail(verdict.failed, verdict.cause)
        if not sheet.open and not sheet.future.done():
            sheet.finish()

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
            key = f"{key_of(call.name)}.on_error"
            call.sheet.give_up(UserError(f"{text}; {key}=zero scores such samples 0, {key}=none leaves them out"))
            self._abandon(call.sheet)
        else:
            call.sheet.fail(call.name, call.places, text, 0.0 if cfg.on_error == "zero" else None)


def _failure(call: Call, function: str, cause: str) -> str:
    place = call.places[0]
    return (
        f"reward function '{call.name}' ({function}) failed on a completion of prompt {place.prompt.index}: {cause}\n"
        f"  completion: {place.sample.text[:80]!r}"
    )
