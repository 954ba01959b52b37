"""`sapo-train`: compose the config, check it, freeze the run folder, start the ranks. Imports no torch."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sapo_rl import compose, launch, run_folder
from sapo_rl.config import Config, LaunchConfig
from sapo_rl.errors import UserError

USAGE = """\
sapo-train: reinforcement-learning fine-tuning under the SAPO objective

  sapo-train config=NAME|FILE.yaml [key=value ...]     run a recipe, or your own file
  sapo-train config=NAME dry_run=true                  show what would happen, and stop
  sapo-train config=NAME --cfg job                     print the composed config
  sapo-train config=A,B loss.tau_neg=1.0,1.05 -m       sweep, one run after the other
  sapo-train resume=runs/NAME/TIME                     continue a run from its last checkpoint

recipes:
"""


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
    ready = compose.Arguments(arguments)
    outcome = Outcome(wants_traceback=os.environ.get(compose.FULL_ERROR) == "1")
    try:
        _refuse_launcher(arguments)
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

    What a job raises is worded here and not passed through Hydra, which would print lines of its own; Hydra's own
    errors are raised as they are, for `main` to word. A job that fails does not end the sweep.
    """
    before = os.environ.get(compose.FULL_ERROR, "0")
    os.environ[compose.FULL_ERROR] = "1"
    sys.argv = [sys.argv[0], *ready.argv]

    @hydra.main(version_base="1.3", config_path=str(compose.CONFIGS), config_name="train")
    def job(composed: DictConfig) -> float | None:
        settings = HydraConfig.get()
        overrides: list[Any] = OmegaConf.to_container(settings.overrides.task)  # pyright: ignore[reportAssignmentType]
        own = replace(ready, argv=[*ready.argv, *overrides])  # in a sweep the latter are this job's own
        try:
            compose.check_choices(composed, overrides)
            config, frozen = compose.accept(composed, ready)
            if config.dry_run:
                from sapo_rl.preview import preview

                preview(config, frozen)
                return None
        except Exception as error:
            outcome.complain(error, own)
            return outcome.hand_over()
        try:
            return run(config, frozen, settings.runtime.choices["config"], typed, ready.files)
        except (UserError, OmegaConfBaseException) as error:
            outcome.complain(error, own)
        except subprocess.CalledProcessError as error:
            outcome.codes.append(error.returncode if error.returncode > 0 else 128 - error.returncode)
        except Exception:
            outcome.program_failed = True
            raise
        return outcome.hand_over()

    try:
        job()
    finally:
        os.environ[compose.FULL_ERROR] = before


def run(config: Config, frozen: str, recipe: str, typed: list[str], files: dict[str, Path]) -> float | None:
    """Freeze the run folder and train in processes of their own.

    Args:
        config: checked.
        frozen: the same as YAML.
        recipe: the name that the run folder goes under.
        typed: the arguments as the user gave them.
        files: the user's own files by recipe name.

    Returns:
        The last `eval/accuracy`, for sweepers that optimise.
    """
    if config.launch.machine_rank > 0 and "RANK" not in os.environ:  # machine 0 makes the folder
        _spawn(config.launch, None)
        return None
    undo: Callable[[], None] = lambda: None  # noqa: E731
    try:
        if config.resume:
            folder = Path(config.resume).expanduser()
            run_folder.refuse_finished(folder, config.trainer.steps)
            undo = run_folder.refreeze(folder, frozen, typed)
        else:
            folder = run_folder.unused(Path("runs") / recipe / time.strftime("%Y-%m-%d_%H-%M-%S"))
            run_folder.create(folder, frozen, typed, files.get(recipe))
    except OSError as error:
        raise UserError(f"the run folder cannot be written: {error}") from error
    if "RANK" in os.environ:
        _run_rank(folder)
    else:
        try:
            _spawn(config.launch, folder)
        except subprocess.CalledProcessError as error:
            if error.returncode == 2:
                undo()
            raise
    return run_folder.last_accuracy(folder)


def _spawn(settings: LaunchConfig, folder: Path | None) -> None:
    """Run this machine's ranks to their end; `folder` is None where another machine makes it.

    Raises:
        subprocess.CalledProcessError: they ended with another exit code than 0.
    """
    command = launch.command(settings, folder)
    # Sets of strings are in the same order on all ranks and after a resume: some generators of prompts depend on it.
    # Threads that wait must not spin: on a CPU the trainer and vLLM take turns on the same cores.
    environment = {"PYTHONHASHSEED": "0", "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    with subprocess.Popen(command, env=environment) as child:
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        while True:
            try:
                code = child.wait()
                break
            except KeyboardInterrupt:  # the terminal sent it to the child too, which saves and stops
                continue
        signal.signal(signal.SIGTERM, before)
    if code:
        raise subprocess.CalledProcessError(code, command)


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


def _run_rank(folder: Path | None) -> None:
    from sapo_rl.rank import main as rank_main

    rank_main(folder)
