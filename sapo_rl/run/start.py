"""From a checked config to the processes of a run: its folder, its ranks, and what is told of their end."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import yaml

from sapo_rl import run_folder
from sapo_rl.config import Config, LaunchConfig
from sapo_rl.config.nested import dumps
from sapo_rl.errors import UserError, program
from sapo_rl.errors.files import expand
from sapo_rl.processes import PARENT, killed_by, scratch, stopping_signals, streams
from sapo_rl.run import launch, packaged, resume
from sapo_rl.run.checks import ConfigError
from sapo_rl.run.earlier import AUTO, ended_early, recipe_of, telling
from sapo_rl.run.names import run_name
from sapo_rl.run.sweep import Job
from sapo_rl.run_folder import record

CHECKS = ("check=chat", "check=rewards")
"""Checks that need no rank."""
Follow: TypeAlias = Callable[[subprocess.Popen[bytes]], int]


@dataclass
class Start:
    """What a run is started from, besides its config."""

    recipe: str
    """The name that the run folder goes under."""
    typed: list[str]
    """The arguments that start this run, as the user would give them."""
    files: dict[str, Path]
    """The user's own files by recipe name."""
    job: Job | None = None
    """In a sweep, the run that it is."""
    begins_at: Path | None = None
    """The checkpoint that a fork begins at."""
    folder: Path | None = None
    """The run folder, once there is one."""
    models: str = ""
    """Where models are to be measured and nothing is trained: these, as JSON."""
    variables: dict[str, str] = field(default_factory=dict)
    """Further environment variables of the training."""
    follow: Follow | None = None
    """Waits for the training, whose stderr is a pipe then, and returns its exit code."""


def run(config: Config, frozen: str, start: Start) -> None:
    """Freeze the run folder, enter it into `start`, and train in processes of their own.

    Args:
        config: checked.
        frozen: the same as YAML.
        start: what else is known of the run.

    Raises:
        UserError: the run folder cannot be made, or is not free; or a model that is made at its first use cannot be.
        subprocess.CalledProcessError: the training ended with another exit code than 0.
    """
    packaged.require(config.model.path)
    if config.launch.machine_rank > 0 and "RANK" not in os.environ:  # machine 0 makes the folder
        _spawn(config.launch, start)
        return
    with contextlib.ExitStack() as stack:
        undo: Callable[[], None] = lambda: None  # noqa: E731
        try:
            if config.resume:
                folder = expand(config.resume)
                lock = stack.enter_context(run_folder.locked(folder))
                undo = run_folder.refreeze(folder, frozen, start.typed)
            else:
                folder, lock = _begin(config, frozen, start, stack)
        except OSError as error:
            raise UserError(f"the run folder cannot be written: {error}") from error
        start.folder = folder
        if "RANK" in os.environ:
            run_rank(folder)
        else:
            try:
                _spawn(config.launch, start, lock)
            except subprocess.CalledProcessError as error:
                if error.returncode == 2:
                    undo()
                raise


def _begin(config: Config, frozen: str, start: Start, stack: contextlib.ExitStack) -> tuple[Path, int]:
    """Make the folder of a new run; return it and its lock, which `stack` lets go of."""
    own = start.files.get(start.recipe)
    if start.begins_at:
        start.recipe = recipe_of(start.begins_at.parents[1])
    folder = _new_folder(config, start)
    lock = stack.enter_context(run_folder.locked(folder))
    if start.begins_at:  # to its ranks it is a run that goes on
        frozen = dumps(yaml.safe_load(frozen) | {"resume": str(folder)})
    run_folder.create(folder, frozen, start.typed, own, _about(start, folder), link=not config.run_dir)
    if start.begins_at:
        resume.begin_fork(start.begins_at, folder)
    if start.models:
        run_folder.write_atomic(folder / run_folder.MODELS, start.models)
    return folder, lock


def _about(start: Start, folder: Path) -> dict[str, Any]:
    """What trackers, reports and a later `resume=auto` know the run by."""
    job, forked = start.job, start.begins_at
    own = [f"{key}={value}" for key, value in job.own.items()] if job else start.typed
    found: dict[str, Any] = {record.NAME: run_name(start.recipe, own, folder.name), record.RECIPE: start.recipe}
    found[record.ARGUMENTS] = telling(start.typed)
    if job:
        found[record.SWEEP] = job.sweep
    if forked:
        found[record.FORK] = {"run": str(forked.parents[1]), "step": run_folder.step_of(forked)}
    return found


def _new_folder(config: Config, start: Start) -> Path:
    """Make the run's folder: `run_dir`, in a sweep a numbered folder in it; or one that is named by the time.

    The latter lies in `runs`, that of a check in `checks`, and where models are measured in `evals`.

    Raises:
        ConfigError: something is in `run_dir` already.
    """
    if config.run_dir is None:
        parent = Path("evals" if start.models else "runs" if config.check == "none" else "checks")
        return run_folder.unused(parent / start.recipe / time.strftime("%Y-%m-%d_%H-%M-%S"))
    folder = expand(config.run_dir) / (str(start.job.number) if start.job else "")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("run_dir", f"'{folder}' cannot be made a folder: {error.strerror}") from error
    if f"resume={AUTO}" in start.typed and folder.name not in ("", "..") and ended_early(folder):
        aside = run_folder.unused(folder.with_name(f"{folder.name}-ended"))
        try:
            folder.replace(aside)
        except OSError as error:
            told = f"'{folder}' holds a run that ended before its first checkpoint and cannot be moved aside"
            raise ConfigError("run_dir", f"{told} ({error.strerror}); empty it, or name a folder in it") from error
        folder.mkdir()
        print(
            f"{program()}: resume=auto: the run there ended before its first checkpoint; it is {aside} now",
            file=sys.stderr,
        )
    if any(path.name != "lost+found" for path in folder.iterdir()):  # which the root of a file system has
        goes_on = (folder / run_folder.CONFIG).is_file() and not start.models
        way = f"; {shlex.quote(f'resume={folder}')} goes on with it" if goes_on else ""
        raise ConfigError("run_dir", f"'{folder}' is not empty; name a new folder{way}")
    return folder


def _spawn(settings: LaunchConfig, start: Start, lock: int | None = None) -> None:
    """Run this machine's ranks to their end.

    Args:
        settings: how many, and of which kind.
        start: its run folder is None where another machine makes it.
        lock: the descriptor of its lock, which the child holds as well.

    Raises:
        subprocess.CalledProcessError: they ended with another exit code than 0.
    """
    command = launch.command(settings, start.folder)
    # Sets of strings are in the same order on all ranks and after a resume: some generators of prompts depend on it.
    # Threads that wait must not spin: on a CPU the trainer and vLLM take turns on the same cores.
    quiet = {"PYTHONHASHSEED": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {**quiet, **os.environ, **streams.UTF8, **start.variables, PARENT: str(os.getpid())}
    scratch.sweep_all()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until both processes have said what it does
    pipe, locks = subprocess.PIPE if start.follow else None, [] if lock is None else [lock]
    with (
        subprocess.Popen(command, env=environment, pass_fds=locks, stderr=pipe) as child,
        _passing_on(child) as passed,
    ):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        code = start.follow(child) if start.follow else child.wait()
    if code:
        scratch.sweep_all()  # a process that was killed has left what it had there
        if -code not in passed:
            _tell_of_end(code, child.pid, start.folder)
        raise subprocess.CalledProcessError(code, command)


@contextlib.contextmanager
def _passing_on(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Hand what asks this process to stop to the child, which saves and stops; yield the signals so far.

    A terminal's Ctrl-C reaches the child twice then, which takes it for one. Where SIGHUP is ignored (`nohup`), it
    stays so.
    """
    passed: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed.append(number)
        child.send_signal(number)

    heard = stopping_signals() if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in heard}
    for number in before:
        signal.signal(number, pass_on)
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell_of_end(code: int, process: int, folder: Path | None) -> None:
    """Say by what the child was killed, which it cannot say itself, and how to go on."""
    if code < 0:
        print(f"{program()}: process {process} {killed_by(-code)}; the run has ended", file=sys.stderr)
    going_on = run_folder.resume_command(folder) if folder else None
    if going_on and code not in (2, 128 + signal.SIGINT):  # where it was told already
        print(f"{program()}: continue it with: {going_on}", file=sys.stderr)


def refuse_launcher(arguments: list[str]) -> None:
    """Raise where a launcher around this process does not do what was asked of it."""
    if "RANK" not in os.environ:
        if "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ:
            raise UserError(
                "accelerate launch has started one process, not as many as asked for: it ignores --num_processes with "
                "--cpu and without GPUs; take --config_file configs/accelerate/ddp.yaml, or sapo-train launch=ddp"
            )
    elif {"-m", "--multirun"} & set(arguments):
        raise UserError("a sweep (-m) starts processes of its own: run sapo-train without a launcher, with launch=ddp")
    elif {"dry_run=true", *CHECKS, "--cfg", "-c"} & set(arguments):  # other ranks would wait for a run
        named = ", ".join(CHECKS)
        raise UserError(f"dry_run, {named} and --cfg are for one process: run sapo-train without a launcher")


def run_rank(folder: Path | None) -> None:
    """Run this process as a rank, which a launcher that the user called has started."""
    from sapo_rl.run.rank import main as rank_main

    rank_main(folder)
