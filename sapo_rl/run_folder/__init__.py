"""The run folder: what a run is made of, written before it starts. Imports nothing heavy."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from sapo_rl.errors import UserError
from sapo_rl.errors.files import expand, is_file
from sapo_rl.run_folder import record
from sapo_rl.run_folder.record import write_atomic
from sapo_rl.run_folder.secrets import redact_override, redact_yaml

CONFIG = "config.yaml"
"""The resolved config; its presence marks a complete run folder."""
OVERRIDES = "overrides.yaml"
"""The command line's arguments, as a list."""
USER_FILE = "user.yaml"
"""Copy of the user's own config file, where there was one."""
METRICS = "metrics.jsonl"
"""One record a line: the source of truth for every number shown anywhere."""
COMPLETIONS = "completions"
"""Folder with a Parquet file for each step."""
PASS_RATES = "pass_rates.parquet"
"""A row a prompt: how often it was solved."""
CHECKPOINTS = "checkpoints"
"""Folder of checkpoints to resume from."""
BEST = "best"
"""Link among the checkpoints to the one with the best evaluation, with `checkpoint.keep_best`."""
FINAL = "final"
"""The trained model as a Hugging Face folder."""
MODELS = "models.json"
"""The models that are measured, in a folder of results where nothing is trained."""
LOCK = ".lock"
"""Locked while the run goes on; holds the process and the machine that lock it."""
TENSORBOARD = "tensorboard"
"""Event files."""
WANDB = "wandb"
"""Files of Weights & Biases."""
LATEST = "latest"
"""Link beside the run folders to the newest."""


def unused(folder: Path) -> Path:
    """Create and return `folder`, or the first of `folder-2`, `folder-3`... that does not exist yet.

    Two runs that ask for the same name at the same time get two folders.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    candidate, number = folder, 2
    while True:
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:
            candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1


def locate(named: str, key: str = "resume") -> Path:
    """Return the run folder that a user names by its path, by a link, or by the folder of a recipe: the newest in it.

    The real folder, for the link `latest` moves on when another run starts. `key` is the word for messages.

    Raises:
        UserError: there is no run.
    """
    folder = expand(named)
    if not is_file(folder / CONFIG):
        folder /= LATEST
    if not is_file(folder / CONFIG):
        raise UserError(f"{key}: '{named}' is no run folder (no {CONFIG} in it)")
    real = folder.resolve()
    if real == Path(os.path.abspath(folder)):
        return folder
    return real if folder.is_absolute() else Path(os.path.relpath(real))


def create(
    folder: Path,
    config_yaml: str,
    overrides: list[str],
    user_file: Path | None,
    about: dict[str, Any] | None = None,
    link: bool = True,
) -> None:
    """Write everything about a run that is known before it starts. Values under secret-looking keys are redacted.

    Args:
        folder: the run folder; it may exist, but may hold no run.
        config_yaml: the resolved config.
        overrides: the arguments as the user typed them.
        user_file: the user's own config file, copied as `user.yaml`.
        about: further facts for `environment.json`, by the keys of `record`.
        link: have `latest`, beside the folder, lead to it.

    Raises:
        UserError: the folder holds a run already.
    """
    if any((folder / name).exists() for name in (CONFIG, METRICS, CHECKPOINTS)):
        command = shlex.quote(f"resume={folder}")
        raise UserError(f"{folder} holds a run already; continue it with {command}, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if user_file is not None:
        write_atomic(folder / USER_FILE, redact_yaml(user_file.read_text(encoding="utf-8")))
    _write_overrides(folder, overrides)
    record.write(folder, record.environment() | {"resumes": []} | (about or {}))
    write_atomic(folder / CONFIG, redact_yaml(config_yaml))  # last: whoever waits for it finds the folder complete
    if link:
        _link_latest(folder)


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the lock of a run folder for the block; yield its descriptor, with which a child holds it as well.

    Over NFS it keeps out other machines too. Where the file system has no locks, nothing is kept out.

    Raises:
        UserError: another process holds it, named with its machine.
        OSError: the folder cannot be written.
    """
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        _take(lock, folder, fcntl.LOCK_EX)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield lock
    finally:
        os.close(lock)


def refuse_going_on(folder: Path) -> None:
    """Raise UserError where another process holds the lock of a run folder; write nothing."""
    with suppress(OSError):  # it was never locked, or may not be looked at
        lock = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            _take(lock, folder, fcntl.LOCK_SH)
        finally:
            os.close(lock)


def is_going_on(folder: Path) -> bool:
    """Return whether another process holds the lock of a run folder."""
    try:
        refuse_going_on(folder)
    except UserError:
        return True
    return False


def _take(lock: int, folder: Path, kind: int) -> None:
    """Take a lock at once, unless the file system has none; raise UserError where another process holds it."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 500).decode(errors="replace").strip() or "another process"
        raise UserError(
            f"resume: '{folder}' is a run that is still going on ({holder}); wait for its end, or stop it"
        ) from None
    except OSError:
        pass


def refreeze(folder: Path, config_yaml: str, overrides: list[str]) -> Callable[[], None]:
    """Replace the config and overrides of a run that is resumed, and add the present environment to its record.

    Returns:
        A function that restores the previous config and overrides. It does nothing once the resumed run has logged a
        step.

    Raises:
        UserError: the folder holds no run.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"resume: '{folder}' is no run folder (no {CONFIG} in it)")
    former = {
        path: path.read_text(encoding="utf-8") for path in (folder / CONFIG, folder / OVERRIDES) if path.is_file()
    }
    told = _size(folder / METRICS)

    def undo() -> None:
        if folder.is_dir() and _size(folder / METRICS) == told:
            for path, text in former.items():
                write_atomic(path, text)

    kept = record.read(folder)
    kept.setdefault("resumes", []).append(record.environment())
    record.write(folder, kept)
    _write_overrides(folder, overrides)
    write_atomic(folder / CONFIG, redact_yaml(config_yaml))
    return undo


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a run's folder of them, oldest first; what else lies there is somebody's own."""
    return sorted((path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)), key=step_of)


def latest_checkpoint(folder: Path) -> Path:
    """Return the newest complete checkpoint in a run's folder of them.

    Raises:
        UserError: there is none.
    """
    found = checkpoints_in(folder)
    if not found:
        raise UserError(f"resume: no checkpoint in '{folder}': the run ended before its first; start it anew")
    return found[-1]


def refuse_finished(folder: Path, steps: int) -> None:
    """Raise UserError where a run has a checkpoint of its last step, the `steps`-th or one beyond, and is complete."""
    for last in checkpoints_in(folder / CHECKPOINTS)[-1:]:
        done = step_of(last)
        if done > steps or (done == steps and (folder / FINAL).exists()):
            raise UserError(
                f"resume: the run has made {done} steps of trainer.steps={steps}; for more, set trainer.steps"
            )


def resume_command(folder: Path) -> str | None:
    """Return the command that continues a run, for the shell; None where it has no checkpoint."""
    if not checkpoints_in(folder / CHECKPOINTS):
        return None
    return f"{command('sapo-train', 'sapo_rl')} {shlex.quote(f'resume={folder}')}"


def command(script: str, module: str) -> str:
    """Return what calls a program of this package from the terminal, whether its environment is activated or not."""
    beside = Path(sys.executable).with_name(script)
    return _called(beside) if beside.exists() else f"{_called(Path(sys.executable))} -m {module}"


def _called(program: Path) -> str:
    if shutil.which(program.name) == str(program):
        return program.name
    with suppress(OSError, ValueError):  # the current folder is gone, or another
        program = program.relative_to(Path.cwd())
    return shlex.quote(str(program))


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint's folder. Raises ValueError where there is none."""
    number = checkpoint.name.removeprefix("step_")
    if not number.isdecimal():
        raise ValueError(f"the folder of a checkpoint is called step_NUMBER, not '{checkpoint.name}'")
    return int(number)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def last_eval_reward(folder: Path) -> float | None:
    """Return the last `eval/reward` in the run's metrics; None where there is none."""
    path = folder / METRICS
    if not path.is_file():
        return None
    found = None
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):  # a line that a killed run left half written
            found = json.loads(line).get("eval/reward", found)
    return found


def open_up(folder: Path) -> None:
    """Give the files in `folder` the mode of any new file there: safetensors makes its own for their owner alone."""
    sample = folder / ".mode"
    sample.touch()
    mode = sample.stat().st_mode & 0o777
    sample.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _write_overrides(folder: Path, overrides: list[str]) -> None:
    write_atomic(folder / OVERRIDES, yaml.safe_dump([redact_override(argument) for argument in overrides]))


def _link_latest(folder: Path) -> None:
    if folder.name != LATEST:
        link_to(folder, LATEST)


def link_to(folder: Path, name: str) -> None:
    """Have the link `name` beside a folder lead to it; what has that name and is no link is left alone."""
    link, part = folder.with_name(name), folder.with_name(f".{name}.{os.getpid()}")
    if link.exists() and not link.is_symlink():
        return
    with suppress(OSError):  # a file system without links
        part.symlink_to(folder.name)
        part.replace(link)
