"""What a Python session does while the training that it started goes on in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sapo_rl import run_folder
from sapo_rl.errors import UserError
from sapo_rl.run.start import Start

POLL_SECONDS = 0.2
PROGRAM = "sapo-train: "
"""Begins an error of the user's that the training tells."""
STOPPED = 128 + signal.SIGINT
"""Exit code of a run that was asked to stop, and has saved a checkpoint."""


class Following:
    """Waits for a training, passes on what it prints to stderr, and tells callbacks of its records as they come.

    Args:
        start: of the run; its folder is known once the training begins.
        callbacks: objects with `on_step`, `on_eval`, or both.
    """

    def __init__(self, start: Start, callbacks: Sequence[Any]) -> None:
        self._start, self._callbacks = start, callbacks
        self._raised: BaseException | None = None
        self._stopping = False
        self._held: list[str] = []
        """Lines of stderr from the first that tells an error of the user's."""

    def __call__(self, child: subprocess.Popen[bytes]) -> int:
        """Return the training's exit code once it has ended and all its records are told."""
        assert self._start.folder is not None and child.stderr is not None
        reader = threading.Thread(
            target=self._pass_on, args=(os.dup(child.stderr.fileno()),), name="stderr", daemon=True
        )
        reader.start()
        records = _new_records(self._start.folder)
        while True:
            ended = child.poll() is not None
            for record in records:
                if record is None:
                    break
                self._tell(record, child)
            if ended:
                reader.join(timeout=5.0)  # a process that outlives the training may hold the pipe open
                return child.returncode
            time.sleep(POLL_SECONDS)

    def end(self, code: int) -> None:
        """Raise what the end of the training means; nothing where it is complete or was asked to stop.

        Raises:
            UserError: a mistake of the user's.
            RuntimeError: any other failure.
        """
        text = "".join(self._held)
        if code == 2 and text:
            raise UserError(text.strip().removeprefix(PROGRAM))
        print(text, end="", file=sys.stderr, flush=True)
        if self._raised is not None:
            raise self._raised
        if code not in (0, STOPPED):
            raise RuntimeError(f"the training ended with exit code {code}; what it printed says why")

    def _pass_on(self, descriptor: int) -> None:
        with open(descriptor, "rb") as lines:  # of its own: Popen could not close one that a thread reads
            for raw in lines:
                line = raw.decode(errors="replace")
                if self._held or line.startswith(PROGRAM):
                    self._held.append(line)
                else:
                    print(line, end="", file=sys.stderr, flush=True)

    def _tell(self, record: dict[str, Any], child: subprocess.Popen[bytes]) -> None:
        evaluated = any(key.startswith("eval/") for key in record)
        name = "on_step" if "time/step" in record else "on_eval" if evaluated else None
        if name is None or self._raised is not None:
            return
        wants_end = False
        try:
            for callback in self._callbacks:
                if hasattr(callback, name):
                    wants_end |= getattr(callback, name)(record["step"], record) is True
        except BaseException as error:
            self._raised, wants_end = error, True
        if wants_end and not self._stopping:  # a second signal would end it at once
            self._stopping = True
            child.send_signal(signal.SIGTERM)


def _new_records(folder: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the records that the training writes from now on, and None whenever there is no further one yet.

    The training begins by making the file anew, with the records that a resume keeps; these are not new.
    """
    path = folder / run_folder.METRICS
    known = run_folder.checkpoints_in(folder / run_folder.CHECKPOINTS)
    last = run_folder.step_of(known[-1]) if known else -1
    before = path.stat().st_ino if path.is_file() else None
    while not path.is_file() or path.stat().st_ino == before:
        yield None
    place = 0
    while True:
        with path.open("rb") as file:  # anew: a new run replaces its first, empty file
            file.seek(place)
            *lines, rest = file.read().split(b"\n")
            place = file.tell() - len(rest)
        for line in lines:
            record = json.loads(line)
            if record["step"] > last and "warning" not in record:
                yield record
        yield None
