"""`sapo-train`: compose the config, check it, freeze the run folder, start the ranks. Imports no torch."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sapo_rl import run_folder
from sapo_rl.config import Config
from sapo_rl.errors import UserError, did_you_mean
from sapo_rl.errors.files import expand, is_folder
from sapo_rl.processes import streams
from sapo_rl.run import compose, explain, keys, launch, packaged, resume, sweep
from sapo_rl.run.start import Start, refuse_launcher, run, run_rank

USAGE = """\
sapo-train: reinforcement-learning fine-tuning under the SAPO objective

  sapo-train config=NAME|FILE.yaml [key=value ...]     run a recipe, or your own file
  sapo-train config=NAME dry_run=true                  show what would happen, and stop
  sapo-train config=NAME check=chat                    show what the chat template does with several turns and tools
  sapo-train config=NAME check=data                    measure how often the model solves the prompts of the data
  sapo-train config=NAME check=rewards                 show what the rewards say of data.check.completions=FILE
  sapo-train check=machine                             GPU, driver, versions that fit, memory, disk
  sapo-train config=NAME --cfg job                     print the composed config
  sapo-train config=A,B loss.tau_neg=1.0,1.05 -m       sweep, one run after the other
  sapo-train config=NAME --config-dir PATH             your own recipe PATH/config/NAME.yaml, and groups
  sapo-train config=NAME run_dir=PATH                  where the run folder shall be (else runs/NAME/<time>)
  sapo-train keys [PART]                               every key with its type, default, range and meaning
  sapo-train resume=runs/NAME[/TIME]                   continue the newest run, or that one, from its last checkpoint
  sapo-train config=NAME resume=auto                   continue the newest that is not complete, or begin a new one
  sapo-train fork=runs/NAME/TIME step=N [key=value]    begin a new run at a checkpoint of another

recipes:
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the arguments say. Exit code 2 means: correct your input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        launch.check_variables(os.environ)
    except UserError as error:
        print(f"sapo-train: {error}", file=sys.stderr)
        sys.exit(2)
    if int(os.environ.get("RANK", "0")) > 0:  # started by torchrun or accelerate: rank 0 composes for all
        run_rank(None)
        return
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage())
        return
    if arguments[0] == "keys":
        sys.exit(_show_keys(arguments[1:]))
    if "check=machine" in arguments:
        from sapo_rl.run.check_machine import check_machine

        sys.exit(check_machine())
    ready = compose.Arguments(arguments)
    outcome = Outcome(wants_traceback=os.environ.get(compose.FULL_ERROR) == "1")
    try:
        refuse_launcher(arguments)
        _refuse_hydra_keys(arguments)
        ready = compose.register(*flags_last(arguments))
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
    """Whether a job has raised what is no mistake of the user's."""

    def complain(self, error: Exception, arguments: compose.Arguments) -> None:
        """Say in two lines what a user's files or arguments have caused.

        It is raised where its traceback is wanted, and where a reader of the output has gone away.
        """
        if isinstance(error, BrokenPipeError) or (self.wants_traceback and not isinstance(error, UserError)):
            self.program_failed = True
            raise error
        print(f"sapo-train: {explain.explain(error, arguments)}", file=sys.stderr)
        self.codes.append(2)

    def hand_over(self) -> None:
        """Raise JobFailed in a job's own process, the one way in which its exit code reaches the command line's."""
        if os.getpid() != self.process:
            raise JobFailed(max(self.codes))


def usage() -> str:
    """Return the usage, and the shipped recipes with a line each."""
    return USAGE + "\n".join(f"  {name:<16}{compose.description(file)}" for name, file in compose.recipes().items())


def _show_keys(parts: list[str]) -> int:
    """Print the keys that begin with one of `parts`, or else contain it; all without any; return the exit code."""
    found: dict[str, keys.Key] = {}
    for part in parts or [""]:
        matching = keys.matching(part)
        if not matching:
            print(f"sapo-train: keys: no key '{part}'; {explain.nearest_key(part)}", file=sys.stderr)
            return 2
        found |= {key.name: key for key in matching}
    print(keys.listing(list(found.values()), min(120, shutil.get_terminal_size().columns)))
    return 0


def flags_last(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Return the arguments with Hydra's flags after the overrides, and the folder that --config-dir names.

    Hydra reads no override that stands behind a flag.

    Raises:
        UserError: an unknown flag, or one with a wrong value.
    """
    parser = get_args_parser()
    parser.allow_abbrev = False

    def refuse(message: str) -> NoReturn:
        if flag := re.match(r"unrecognized arguments: (--?([\w.-]+))", message):
            near = explain.nearest_key(flag[2].replace("-", "_"))
            told = f"no such flag (--hydra-help tells all); a setting is key=value, without dashes; {near}"
            raise UserError(f"{flag[1]} (command line): {told}")
        raise UserError(f"{message}; the flags are those of Hydra: sapo-train --hydra-help")

    parser.error = refuse
    if "--" in argv:
        raise UserError("'--' (command line): leave it out; flags may stand anywhere")
    found = parser.parse_intermixed_args(list(argv))
    _refuse_flags(found)
    flags = list(argv)
    for override in found.overrides:
        flags.remove(override)
    return ([] if found.hydra_help else found.overrides) + flags, found.config_dir


def _refuse_flags(found: argparse.Namespace) -> None:
    """Raise where a flag of Hydra's cannot be, or could run code out of a file."""
    if found.experimental_rerun is not None:
        raise UserError("--experimental-rerun: its file can run code; take resume=FOLDER")
    if found.config_name is not None:
        raise UserError(f"--config-name: write config={found.config_name}")
    if found.config_path is not None:
        raise UserError("--config-path: leave it out; a folder with groups of your own is --config-dir")
    if found.config_dir is not None and not is_folder(expand(found.config_dir)):
        raise UserError(f"--config-dir: no folder '{found.config_dir}'")
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
    if found.package is not None:
        sections = [one.name for one in fields(Config) if is_dataclass(one.default_factory)]
        if found.cfg is None:
            raise UserError("--package: goes with --cfg job")
        if found.package not in sections:
            raise UserError(f"--package: no section '{found.package}'; {did_you_mean(found.package, sections)}")
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
        start = Start(settings.runtime.choices["config"], own, ready.files, one)
        try:
            _attempt(composed, overrides, ready, start, outcome)
        finally:
            code = max(outcome.codes[before:], default=0)
            if one:
                results.append(sweep.Result(one, start.folder, code))
        outcome.hand_over()
        return run_folder.last_eval_reward(start.folder) if start.folder and not code else None

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
        config, frozen = compose.accept(composed, ready, overrides)
        resumed = resume.plan(config, frozen) if config.resume or config.fork else None
        if config.dry_run:
            from sapo_rl.run.preview import preview

            preview(config, frozen, resumed)
            return
        if config.check == "chat":
            from sapo_rl.run.check_chat import check_chat

            packaged.require(config.model.path)
            check_chat(config)
            return
        if config.check == "rewards":
            from sapo_rl.run.check_rewards import check_rewards

            packaged.require(config.model.path)

            check_rewards(config)
            return
    except Exception as error:
        outcome.complain(error, own)
        return
    start.begins_at = resumed.checkpoint if resumed and config.fork else None
    streams.outlive()
    try:
        run(config, frozen, start)
    except (UserError, OmegaConfBaseException) as error:
        outcome.complain(error, own)
    except subprocess.CalledProcessError as error:
        outcome.codes.append(error.returncode if error.returncode > 0 else 128 - error.returncode)
    except Exception:
        outcome.program_failed = True
        raise


def _refuse_hydra_keys(arguments: list[str]) -> None:
    for key in (argument.partition("=")[0].lstrip("+~") for argument in arguments):
        if key in ("hydra.sweeper", "hydra.launcher"):
            raise UserError(f"{key} (command line): is a section; choose one with {key.replace('.', '/')}=NAME")
        if key in ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"):
            raise UserError(f"{key} (command line): has no effect here; run_dir=PATH chooses the run folder")
