"""Scoring in worker processes that can be killed.

A reward function is user code on a model's words: it may hang in C, exhaust memory or end its process. Nothing inside a
process stops all of these, so functions run in workers that are replaced when they die and killed when they are late.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from sapo_rl.config import RewardConfig
from sapo_rl.errors import UserError, did_you_mean
from sapo_rl.rewards.inbox import Inbox
from sapo_rl.rewards.scoring import GIVEN, call_arguments
from sapo_rl.types import Group

CLOSED = "the pool of reward functions is closed"
_START_TIMEOUT = 300.0  # seconds for a worker to import the user's modules
_CHUNK = 1 << 20  # bytes read at once, more than most answers have
_FOREIGN = "it wrote to a file descriptor that is not its own, or closed it"


@dataclass(slots=True)
class RewardStats:
    """What happened while one batch was scored; dictionaries by the function's name in the config."""

    errors: dict[str, int]
    """Samples on which the function failed and that were scored 0."""
    not_applicable: dict[str, int]
    """Samples for which the function returned None."""
    failures: dict[str, str]
    """The text of the first failure of each function that failed."""


@dataclass(slots=True, eq=False)
class _Task:
    """One call: a function on some samples of a group, all of them or, to find who is at fault, one."""

    name: str
    group: Group
    positions: list[int]
    origin: _Task | None = None
    """The failed call that this one is a part of."""
    patient: bool = False
    late: bool = False
    cause: str = ""
    open_parts: int = 0
    failed_parts: int = 0


@dataclass(slots=True)
class _Outcome:
    scores: list[float | None] | None
    cause: str
    dead: bool = False
    late: bool = False
    needs: dict[str, list[str]] = field(default_factory=dict)


class RewardPool:
    """Scores groups of samples in `cfg.workers` processes; a context manager, whose exit leaves no process behind.

    Functions are called on whole groups. A call fails when it raises, returns anything but one finite number or None
    for each sample, takes longer than `timeout`, or takes its process down. Its samples are then scored one by one:
    those that fail alone end the run (`on_error: raise`) or score 0 and are counted (`zero`), the others keep the value
    they get alone. Where none fails alone, a late call is repeated with `timeout` seconds for each of its samples, as
    are all later calls of that function (it is slow, it does not hang); any other failure is the whole group's.

    Enter and use the pool in one thread: on Linux the workers die with the thread that started them.
    """

    def __init__(self, cfg: RewardConfig) -> None:
        self._functions = cfg.functions
        self._size = cfg.workers
        self._workers: list[_Worker] = []
        self._closed = False
        self._queue: deque[_Task] = deque()
        self._groups: list[Group] = []
        self._stats = self._new_stats()
        self._slow: set[str] = set()
        self._needs: dict[str, list[str]] = {}
        """Columns without which a function cannot be called, by its name."""

    def __enter__(self) -> RewardPool:
        """Start the workers and wait until they have imported the functions.

        Raises:
            UserError: a function that cannot be imported, named.
        """
        self._closed = False
        try:
            self._fill()
            while not all(worker.ready for worker in self._workers):
                self._advance()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers."""
        self._close()

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
        for name, needed in self._needs.items():
            for column in needed:
                if column not in columns:
                    raise UserError(
                        f"reward function '{name}' ({self._functions[name].function}) needs '{column}', which is no "
                        f"column of {source} and not in reward.functions.{name}.args; {did_you_mean(column, columns)}"
                    )

    def score(self, groups: Sequence[Group]) -> RewardStats:
        """Set `sample.rewards[name]` of every sample in `groups` for every function of the config.

        Raises:
            UserError: a failed sample of a function whose `on_error` is `raise`.
        """
        for group in groups:
            self._add(group)
        return self.finish()

    def follow(self, inbox: Inbox) -> None:
        """Score groups while they come in; return once the inbox is closed. `finish` completes what is left.

        Raises:
            UserError: as `score`.
        """
        with self._abandoning():
            while not inbox.connection.closed:
                if inbox.connection in self._advance(inbox) and (group := inbox.take()) is not None:
                    self._add(group)

    def finish(self) -> RewardStats:
        """Score what is left of the groups that came in since the last call; return what happened to all of them.

        Raises:
            UserError: as `score`.
        """
        with self._abandoning():
            while self._queue or any(worker.task is not None for worker in self._workers):
                self._advance()
        samples = [sample for group in self._groups for sample in group.samples]
        for name in self._functions:
            self._stats.not_applicable[name] = sum(sample.rewards[name] is None for sample in samples)
        done, self._stats, self._groups = self._stats, self._new_stats(), []
        return done

    def _add(self, group: Group) -> None:
        self._groups.append(group)
        self._queue.extend(_Task(name, group, list(range(len(group.samples)))) for name in self._functions)

    def _new_stats(self) -> RewardStats:
        return RewardStats(dict.fromkeys(self._functions, 0), dict.fromkeys(self._functions, 0), {})

    def _advance(self, inbox: Inbox | None = None) -> list[Any]:
        """Hand out tasks, wait for the next event, here or in the inbox, and deal with it; return what was ready."""
        self._fill()
        for worker in self._workers:
            if self._queue and worker.ready and worker.task is None:
                self._give(worker, self._queue.popleft())
        busy = [worker for worker in self._workers if worker.busy]
        soonest = min((worker.deadline for worker in busy), default=math.inf if inbox else 0.0)
        patience = None if soonest == math.inf else max(0.0, soonest - time.monotonic())
        answered = wait([*(worker.connection for worker in busy), *([inbox.connection] if inbox else [])], patience)
        for worker in busy:
            outcome = worker.receive() if worker.connection in answered else None
            if outcome is None and time.monotonic() >= worker.deadline:
                outcome = _Outcome(None, "took too long", dead=True, late=True)
            if outcome is not None:
                self._settle(worker, outcome)
        return answered

    def _give(self, worker: _Worker, task: _Task) -> None:
        task.patient = task.name in self._slow
        limit = self._functions[task.name].timeout * (len(task.positions) if task.patient else 1)
        try:
            worker.send(task, limit)
        except OSError:  # it died while it had nothing to do
            self._queue.appendleft(task)
            self._replace(worker)

    def _settle(self, worker: _Worker, outcome: _Outcome) -> None:
        if not worker.ready:
            if outcome.cause:
                raise UserError(f"reward functions cannot be loaded: {outcome.cause}")
            worker.ready, worker.deadline, self._needs = True, math.inf, outcome.needs
            return
        task, worker.task, worker.deadline = worker.task, None, math.inf
        assert task is not None
        if outcome.dead:
            self._replace(worker)
        if outcome.scores is not None:
            for position, value in zip(task.positions, outcome.scores, strict=True):
                task.group.samples[position].rewards[task.name] = value
        elif len(task.positions) > 1:
            self._split(task, outcome)
            return
        else:
            limit = self._functions[task.name].timeout
            self._fail(task, f"took longer than {limit:g} s" if outcome.late else outcome.cause)
        if task.origin is not None:
            self._part_done(task.origin, task, outcome.scores is None)

    def _split(self, task: _Task, outcome: _Outcome) -> None:
        task.cause, task.late, task.open_parts = outcome.cause, outcome.late, len(task.positions)
        parts = [_Task(task.name, task.group, [position], origin=task) for position in task.positions]
        self._queue.extendleft(reversed(parts))

    def _part_done(self, whole: _Task, part: _Task, failed: bool) -> None:
        whole.open_parts -= 1
        whole.failed_parts += failed
        if whole.open_parts or whole.failed_parts:
            return
        if whole.late and not whole.patient:
            self._slow.add(whole.name)
            self._queue.append(_Task(whole.name, whole.group, whole.positions))
        else:
            self._fail(whole, f"{whole.cause}, called on the whole group; on none of its samples alone")

    def _fail(self, task: _Task, cause: str) -> None:
        cfg = self._functions[task.name]
        index, excerpt = task.group.prompt.index, task.group.samples[task.positions[0]].text[:80]
        text = (
            f"reward function '{task.name}' ({cfg.function}) failed on a completion of prompt {index}: {cause}\n"
            f"  completion: {excerpt!r}"
        )
        if cfg.on_error == "raise":
            raise UserError(f"{text}; reward.functions.{task.name}.on_error=zero scores such samples 0")
        for position in task.positions:
            task.group.samples[position].rewards[task.name] = 0.0
        self._stats.errors[task.name] += len(task.positions)
        self._stats.failures.setdefault(task.name, text)

    def _fill(self) -> None:
        if self._closed:  # by the thread that entered it, while another scores
            raise RuntimeError(CLOSED)
        while len(self._workers) < self._size:
            self._workers.append(_Worker({name: (f.function, f.args) for name, f in self._functions.items()}))

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self._workers = [other for other in self._workers if other is not worker]
        self._fill()

    @contextlib.contextmanager
    def _abandoning(self) -> Iterator[None]:
        """Forget what is not finished, where scoring is interrupted."""
        try:
            yield
        except BaseException as error:
            self._queue.clear()
            self._stats, self._groups = self._new_stats(), []
            busy = [worker for worker in self._workers if worker.task is not None]
            for worker in busy:
                worker.kill()
            self._workers = [worker for worker in self._workers if worker not in busy]
            if self._closed:
                raise RuntimeError(CLOSED) from error
            raise

    def _close(self) -> None:
        self._closed = True
        for worker in self._workers:
            worker.kill()
        self._workers.clear()


class _Worker:
    """One child process and what it is doing."""

    def __init__(self, functions: dict[str, tuple[str, dict[str, Any]]]) -> None:
        self.ready = False
        self.task: _Task | None = None
        self.deadline = time.monotonic() + _START_TIMEOUT
        self._call = 0
        """Number of the call that is answered next; loading the functions is the first."""
        self._read = b""
        ours, theirs = multiprocessing.Pipe()
        self.connection: Connection = ours
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sapo_rl.rewards.worker", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # The worker imports what this process could, and Ctrl-C on the terminal reaches only this process.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                start_new_session=True,
            )
        with contextlib.suppress(OSError):  # it is dead already: `receive` tells how
            self.connection.send(functions)

    @property
    def busy(self) -> bool:
        """Whether an answer is expected."""
        return self.task is not None or not self.ready

    def send(self, task: _Task, limit: float) -> None:
        """Start a task that has `limit` seconds.

        Raises:
            OSError: the process is dead.
        """
        self._call += 1
        self.connection.send((self._call, task.name, call_arguments(task.group, task.positions)))
        self.task, self.deadline = task, time.monotonic() + limit

    def receive(self) -> _Outcome | None:
        """Read what is waiting: the answer, how the process died, or None where it is only a part of the answer."""
        try:
            found = os.read(self.connection.fileno(), _CHUNK)
        except OSError:
            found = b""
        if not found:
            return _Outcome(None, self._end(), dead=True)
        self._read += found
        if not self._read.endswith(b"\n"):
            return None
        line, self._read = self._read, b""
        try:
            answer = json.loads(line)
            if answer["call"] == self._call:
                return _Outcome(answer.get("scores"), answer.get("failed", ""), needs=answer.get("needs", {}))
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        return _Outcome(None, _FOREIGN, dead=True)

    def _end(self) -> str:
        """Say how the process ended; one that has closed the connection may live on."""
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            code = os.EX_PROTOCOL
        if code == os.EX_PROTOCOL:  # the worker's own for a connection that is gone
            return _FOREIGN
        return f"its process ended {f'by signal {-code}' if code < 0 else f'with exit code {code}'}"

    def kill(self) -> None:
        """End the process and all that it started."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
