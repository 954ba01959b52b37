"""`sapo-train`: compose the config, check it, freeze the run folder, start the ranks. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sapo_rl import compose, launch, run_folder, streams
from sapo_rl.checks import ConfigError
from sapo_rl.config import Config, LaunchConfig
from sapo_rl.errors import UserError
from sapo_rl.processes import PARENT, killed_by, stopping_signals
from sapo_rl.rollout import scratch
from sapo_rl.run import keys, resume, sweep

USAGE = """\
sapo-train: reinforcement-learning fine-tuning under the SAPO objective

  sapo-train config=NAME|FILE.yaml [key=value ...]     run a recipe, or your own file
  sapo-train config=NAME dry_run=true                  show what would happen, and stop
  sapo-train config=NAME --cfg job                     print the composed config
  sapo-train config=A,B loss.tau_neg=1.0,1.05 -m       sweep, one run after the other
  sapo-train config=NAME run_dir=PATH                  where the run folder shall be (else runs/NAME/<time>)
  sapo-train keys [PART]                               every key with its type, default, range and meaning
  sapo-train resume=runs/NAME[/TIME]                   continue the newest run, or that one, from its last checkpoint

recipes:
"""


@dataclass
class Start:
    """What a run is started from, besides its config."""

    recipe: str
    """The name that the run folder goes under."""
    typed: list[str]
    """The arguments that start this run, as the user would give them."""
    files: dict[str, Path]
    """The user's own files by recipe name."""
    number: int | None = None
    """In a sweep, from 1."""
    folder: Path | None = None
    """The run folder, once there is one."""


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the arguments say. Exit code 2 means: mend your input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        launch.check_variables(os.environ)
    except UserError as error:
        print(f"sapo-train: {error}", file=sys.stderr)
        sys.exit(2)
    if int(os.environ.get("RANK", "0")) > 0:  # started by torchrun or accelerate: rank 0 composes for all
        _run_rank(None)
        return
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage())
        return
    if arguments[0] == "keys":
        sys.exit(_show_keys(arguments[1:]))
    ready = compose.Arguments(arguments)
    outcome = Outcome(wants_traceback=os.environ.get(compose.FULL_ERROR) == "1")
    try:
        _refuse_launcher(arguments)
        _refuse_hydra_folders(arguments)
        ready = compose.register(flags_last(arguments))
        _hydra(ready, arguments, outcome)
    except JobFailed as error:  # a launcher ran it in a process of its own, where it was told
        outcome.codes.append(error.code)
    except Exception as error:
        if outcome.program_failed:
            raise
        outcome.complain(error, ready)
    if code := max(outcome.codes):
        sys.exit(code)


class JobFailed(Exception):
    """How a job ended that a launcher, such as joblib, ran in its own process; `code` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class Outcome:
    """How the jobs of a command line have ended."""

    wants_traceback: bool
    """Whether what composing a config raises is to be shown with its traceback, not in two lines."""
    codes: list[int] = field(default_factory=lambda: [0])
    """Exit codes."""
    process: int = field(default_factory=os.getpid)
    """Where the command line was read; jobs in other processes have copies of this object, which are lost."""
    program_failed: bool = False
    """Whether a job has raised what no user can mend."""

    def complain(self, error: Exception, arguments: compose.Arguments) -> None:
        """Say in two lines what a user's files or arguments have caused.

        It is raised where its traceback is wanted, and where a reader of the output has gone away.
        """
        if isinstance(error, BrokenPipeError) or (self.wants_traceback and not isinstance(error, UserError)):
            self.program_failed = True
            raise error
        print(f"sapo-train: {compose.explain(error, arguments)}", file=sys.stderr)
        self.codes.append(2)

    def hand_over(self) -> None:
        """Raise JobFailed in a job's own process, the one way in which its exit code reaches the command line's."""
        if os.getpid() != self.process:
            raise JobFailed(max(self.codes))


def usage() -> str:
    """Return the usage, and the shipped recipes with a line each."""
    return USAGE + "\n".join(f"  {name:<16}{text}" for name, text in compose.recipes().items())


def _show_keys(parts: list[str]) -> int:
    """Print the keys that begin with one of `parts`, or else contain it; all without any; return the exit code."""
    found: dict[str, keys.Key] = {}
    for part in parts or [""]:
        matching = keys.matching(part)
        if not matching:
            print(f"sapo-train: keys: no key '{part}'; {compose.nearest_key(part)}", file=sys.stderr)
            return 2
        found |= {key.name: key for key in matching}
    print(keys.listing(list(found.values()), min(120, shutil.get_terminal_size().columns)))
    return 0


def flags_last(argv: Sequence[str]) -> list[str]:
    """Return the arguments with Hydra's flags after the overrides; it reads no override that stands behind a flag.

    Raises:
        UserError: an unknown flag, or one with a wrong value.
    """
    parser = get_args_parser()
    parser.allow_abbrev = False

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; the flags are those of Hydra: sapo-train --hydra-help")

    parser.error = refuse
    found = parser.parse_intermixed_args(list(argv))
    _refuse_flags(found)
    flags = list(argv)
    for override in found.overrides:
        flags.remove(override)
    return [*found.overrides, *flags]


def _refuse_flags(found: argparse.Namespace) -> None:
    """Raise where a flag of Hydra's cannot be, or could run code out of a file."""
    if found.experimental_rerun is not None:
        raise UserError("--experimental-rerun: its file can run code; take resume=FOLDER")
    if found.config_name is not None:
        raise UserError(f"--config-name: write config={found.config_name}")
    if found.config_path is not None:
        raise UserError("--config-path: leave it out; a folder with groups of your own is --config-dir")
    modes = {
        "--run": found.run,
        "--multirun": found.multirun,
        "--cfg": found.cfg is not None,
        "--info": found.info is not None,
        "--shell-completion": found.shell_completion,
    }
    given = [name for name, is_given in modes.items() if is_given]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: only one of them can be")
    if found.resolve and found.cfg is None:
        raise UserError("--resolve: goes with --cfg job")
    shells = r"(install|uninstall|query)=(bash|zsh|fish)"
    if found.shell_completion and not re.fullmatch(shells, " ".join(found.overrides)):
        raise UserError("--shell-completion: takes install=, uninstall= or query=, each with bash, zsh or fish")


def _hydra(ready: compose.Arguments, typed: list[str], outcome: Outcome) -> None:
    """Let Hydra read the arguments and run one job or a sweep; `outcome` gets the exit codes.

    A sweep tells which of its runs begins, and ends with a table of them; a run that fails does not end it. What a job
    raises is worded here and not passed through Hydra, which would print lines of its own; Hydra's own errors are
    raised as they are, for `main` to word.
    """
    sys.argv = [sys.argv[0], *ready.argv]
    results: list[sweep.Result] = []

    @hydra.main(version_base="1.3", config_path=str(compose.CONFIGS), config_name="train")
    def job(composed: DictConfig) -> float | None:
        settings = HydraConfig.get()
        overrides: list[Any] = OmegaConf.to_container(settings.overrides.task)  # pyright: ignore[reportAssignmentType]
        one = sweep.this_job(settings, ready.argv, ready.files)
        own, before = typed, len(outcome.codes)
        if one:
            streams.outlive()
            print(one.title, flush=True)
            own = sweep.own_arguments(typed, one)
        start = Start(settings.runtime.choices["config"], own, ready.files, one.number if one else None)
        try:
            _attempt(composed, overrides, ready, start, outcome)
        finally:
            code = max(outcome.codes[before:], default=0)
            if one:
                results.append(sweep.Result(one, start.folder, code))
        outcome.hand_over()
        return run_folder.last_accuracy(start.folder) if start.folder and not code else None

    full_error = os.environ.get(compose.FULL_ERROR, "0")
    os.environ[compose.FULL_ERROR] = "1"
    try:
        job()
    finally:
        os.environ[compose.FULL_ERROR] = full_error
    if any(result.folder for result in results):
        sweep.show(results)


def _attempt(
    composed: DictConfig, overrides: list[Any], ready: compose.Arguments, start: Start, outcome: Outcome
) -> None:
    """Check a composed config, and show it or run it; `outcome` gets the exit code of what fails."""
    own = replace(ready, argv=[*ready.argv, *overrides])  # in a sweep the latter are this job's own
    try:
        compose.check_choices(composed, overrides)
        config, frozen = compose.accept(composed, ready)
        if config.resume and config.run_dir:
            raise ConfigError("run_dir", "a run that is resumed stays in its folder; leave run_dir out")
        resumed = resume.plan(config, frozen) if config.resume else None
        if config.dry_run:
            from sapo_rl.preview import preview

            preview(config, frozen, resumed)
            return
    except Exception as error:
        outcome.complain(error, own)
        return
    try:
        run(config, frozen, start)
    except (UserError, OmegaConfBaseException) as error:
        outcome.complain(error, own)
    except subprocess.CalledProcessError as error:
        outcome.codes.append(error.returncode if error.returncode > 0 else 128 - error.returncode)
    except Exception:
        outcome.program_failed = True
        raise


def run(config: Config, frozen: str, start: Start) -> None:
    """Freeze the run folder, enter it into `start`, and train in processes of their own.

    Args:
        config: checked.
        frozen: the same as YAML.
        start: what else is known of the run.

    Raises:
        UserError: the run folder cannot be made, or is not free.
        subprocess.CalledProcessError: the training ended with another exit code than 0.
    """
    streams.outlive()
    if config.launch.machine_rank > 0 and "RANK" not in os.environ:  # machine 0 makes the folder
        _spawn(config.launch, None)
        return
    with contextlib.ExitStack() as stack:
        undo: Callable[[], None] = lambda: None  # noqa: E731
        try:
            if config.resume:
                folder = Path(config.resume).expanduser()
                lock = stack.enter_context(run_folder.locked(folder))
                undo = run_folder.refreeze(folder, frozen, start.typed)
            else:
                folder = _new_folder(config.run_dir, start)
                lock = stack.enter_context(run_folder.locked(folder))
                run_folder.create(folder, frozen, start.typed, start.files.get(start.recipe), link=not config.run_dir)
        except OSError as error:
            raise UserError(f"the run folder cannot be written: {error}") from error
        start.folder = folder
        if "RANK" in os.environ:
            _run_rank(folder)
        else:
            try:
                _spawn(config.launch, folder, lock)
            except subprocess.CalledProcessError as error:
                if error.returncode == 2:
                    undo()
                raise


def _new_folder(run_dir: str | None, start: Start) -> Path:
    """Make the run's folder: `run_dir`, in a sweep a numbered folder in it; or one in `runs` that is named by the time.

    Raises:
        ConfigError: something is in `run_dir` already.
    """
    if run_dir is None:
        return run_folder.unused(Path("runs") / start.recipe / time.strftime("%Y-%m-%d_%H-%M-%S"))
    folder = Path(run_dir).expanduser() / (str(start.number) if start.number else "")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        way = f"; {shlex.quote(f'resume={folder}')} goes on with it" if (folder / run_folder.CONFIG).is_file() else ""
        raise ConfigError("run_dir", f"'{folder}' is not empty; name a new folder{way}")
    return folder


def _spawn(settings: LaunchConfig, folder: Path | None, lock: int | None = None) -> None:
    """Run this machine's ranks to their end.

    Args:
        settings: how many, and of which kind.
        folder: the run folder; None where another machine makes it.
        lock: the descriptor of its lock, which the child holds as well.

    Raises:
        subprocess.CalledProcessError: they ended with another exit code than 0.
    """
    command = launch.command(settings, folder)
    # Sets of strings are in the same order on all ranks and after a resume: some generators of prompts depend on it.
    # Threads that wait must not spin: on a CPU the trainer and vLLM take turns on the same cores.
    quiet = {"PYTHONHASHSEED": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {**quiet, **os.environ, **streams.UTF8, PARENT: str(os.getpid())}
    scratch.sweep_all()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until both processes have said what it does
    with (
        subprocess.Popen(command, env=environment, pass_fds=[] if lock is None else [lock]) as child,
        _passing_on(child) as passed,
    ):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        code = child.wait()
    if code:
        scratch.sweep_all()  # a process that was killed has left what it had there
        if -code not in passed:
            _tell_of_end(code, child.pid, folder)
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

    before = {number: signal.getsignal(number) for number in stopping_signals()}
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
        print(f"sapo-train: process {process} {killed_by(-code)}; the run has ended", file=sys.stderr)
    going_on = run_folder.resume_command(folder) if folder else None
    if going_on and code not in (2, 128 + signal.SIGINT):  # where it was told already
        print(f"sapo-train: continue it with: {going_on}", file=sys.stderr)


def _refuse_launcher(arguments: list[str]) -> None:
    """Raise where a launcher around this process does not do what was asked of it."""
    if "RANK" not in os.environ:
        if "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ:
            raise UserError(
                "accelerate launch has started one process, not as many as asked for: it ignores --num_processes with "
                "--cpu and without GPUs; take --config_file configs/accelerate/ddp.yaml, or sapo-train launch=ddp"
            )
    elif {"-m", "--multirun"} & set(arguments):
        raise UserError("a sweep (-m) starts processes of its own: run sapo-train without a launcher, with launch=ddp")
    elif {"dry_run=true", "--cfg", "-c"} & set(arguments):  # other ranks would wait for a run
        raise UserError("dry_run and --cfg are for one process: run sapo-train without a launcher")


def _refuse_hydra_folders(arguments: list[str]) -> None:
    for key in (argument.partition("=")[0].lstrip("+~") for argument in arguments):
        if key in ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"):
            raise UserError(f"{key} (command line): has no effect here; run_dir=PATH chooses the run folder")


def _run_rank(folder: Path | None) -> None:
    from sapo_rl.rank import main as rank_main

    rank_main(folder)
