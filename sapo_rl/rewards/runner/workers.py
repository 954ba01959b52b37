"""The worker processes of a pool: as many as asked for, with what they may see and where they print."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sapo_rl.config import RewardConfig
from sapo_rl.errors.files import touch_log
from sapo_rl.processes.hidden import environment_of, hidden, with_hint
from sapo_rl.rewards.runner.process import WorkerProcess


class Workers:
    """Keeps `cfg.workers` processes; iterates over them.

    Args:
        cfg: the functions, how many workers run them, and which secrets these see.
        log: file that takes what functions print; None leaves it to this process's stdout and stderr.
    """

    def __init__(self, cfg: RewardConfig, log: Path | None) -> None:
        self._cfg = cfg
        self._count = cfg.workers if cfg.functions else 0
        self._log = log
        self._workers: list[WorkerProcess] = []
        self._hidden: list[str] = []

    def __iter__(self) -> Iterator[WorkerProcess]:
        return iter(self._workers)

    def open(self) -> None:
        """Start all workers, without waiting for them.

        Raises:
            UserError: the log cannot be written.
        """
        touch_log(self._log, "reward functions")
        self.fill()

    def fill(self, retried: bool = False) -> None:
        """Start a worker for each that is missing; `retried` is that of `WorkerProcess`."""
        if len(self._workers) == self._count:  # after nearly every answer: an environment costs more to make
            return
        self._hidden = hidden(os.environ, self._cfg.env)
        environment = environment_of(self._hidden)
        while len(self._workers) < self._count:
            self._workers.append(WorkerProcess(self._cfg, environment, self._log, retried))

    def replace(self, worker: WorkerProcess, retried: bool = False) -> None:
        """End one worker and start another in its place."""
        self.end([worker])
        self.fill(retried)

    def end(self, workers: Sequence[WorkerProcess]) -> None:
        """End some of the workers and all that they have started."""
        self._workers = [worker for worker in self._workers if worker not in workers]
        for worker in workers:
            worker.hang_up()
        for worker in workers:
            worker.kill()

    def close(self) -> None:
        """End all workers."""
        self.end([*self._workers])

    def with_hint(self, cause: str) -> str:
        """Add to a failure that names a variable which functions do not see how they get to see it."""
        return with_hint(cause, self._hidden)
