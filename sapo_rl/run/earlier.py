"""Arguments that begin at an earlier run: `resume=FOLDER`, `fork=FOLDER`, and `resume=auto`, which looks for one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from sapo_rl import run_folder
from sapo_rl.errors import UserError
from sapo_rl.errors.files import expand, is_file
from sapo_rl.run.names import matters
from sapo_rl.run_folder import record
from sapo_rl.run_folder.secrets import redact_override

AUTO = "auto"
"""`resume=` with it takes the newest run of the recipe that is not complete, or begins a new one."""


def arguments_of(argv: list[str], recipe: Callable[[str], str]) -> list[str]:
    """Return the arguments with the config of the earlier run that they begin at, where they do.

    Args:
        argv: as typed.
        recipe: returns the name under which the runs of a `config=` lie.

    Raises:
        UserError: there is no such run, or other arguments do not go with it.
    """
    argv = _look(argv, recipe) if _last(argv, "resume") == AUTO else argv
    resumed, forked = _last(argv, "resume"), _last(argv, "fork")
    key, named = ("resume", resumed) if resumed is not None else ("fork", forked)
    if named is None:
        return argv
    if resumed is not None and forked is not None:
        raise UserError("fork begins a run of its own: leave resume out")
    if _last(argv, "config") is not None:
        raise UserError(f"{key} continues with the config of its run folder: leave config= out, override single keys")
    folder = run_folder.locate(named, key)
    # Quoted: Hydra would stumble over some characters of a path.
    return [f"config={folder / run_folder.CONFIG}", f"{key}={quoted(str(folder))}", *_without(argv, key)]


def quoted(text: str) -> str:
    """Return a text as Hydra reads it back, whatever characters are in it."""
    return "'" + text.replace("'", "\\'") + "'"


def recipe_of(folder: Path) -> str:
    """Return the name of the recipe that a run was started from."""
    return record.read(folder).get(record.RECIPE, folder.resolve().parent.name)


def telling(typed: Iterable[str]) -> list[str]:
    """Return those of the arguments that tell a run from others of its recipe, in an order of their own."""
    return sorted(redact_override(one) for one in typed if matters(one))


def _look(argv: list[str], recipe: Callable[[str], str]) -> list[str]:
    """Replace `resume=auto` and what goes with a new run, where there is one to go on with; else leave it out."""
    if {"-m", "--multirun"} & set(argv):
        raise UserError("resume=auto is for one run, not for a sweep (-m)")
    others = _without(argv, "resume")
    if (_last(argv, "launch.machine_rank") or "0") != "0":  # machine 0 chooses for all
        return others
    forked, place = _last(argv, "fork"), _last(argv, "run_dir")
    if place is not None:
        candidates = [expand(place)]
    else:
        name = recipe_of(run_folder.locate(forked, "fork")) if forked else recipe(_last(argv, "config") or "default")
        candidates = [path for path in Path("runs", name).glob("*") if not path.is_symlink()]
    wanted = None if place is not None else telling(others)
    found = [folder for folder in candidates if _goes_on(folder, wanted)]
    if not found:
        print("sapo-train: resume=auto: there is no run to go on with; a new one begins", file=sys.stderr)
        return others
    newest = max(found, key=lambda folder: (folder / run_folder.CONFIG).stat().st_mtime)
    print(f"sapo-train: resume=auto: goes on with {newest}", file=sys.stderr)
    return [f"resume={newest}", *_without(others, "config", "fork", "step", "run_dir")]


def _goes_on(folder: Path, wanted: list[str] | None) -> bool:
    """Whether a folder holds a run by these arguments that is not complete, has a checkpoint, and is not going on."""
    if not is_file(folder / run_folder.CONFIG):
        return False
    with contextlib.suppress(UserError):  # it goes on, or is damaged
        run_folder.refuse_going_on(folder)
        same = wanted is None or record.read(folder).get(record.ARGUMENTS) == wanted
        return same and _is_unfinished(folder)
    return False


def _is_unfinished(folder: Path) -> bool:
    saved = run_folder.checkpoints_in(folder / run_folder.CHECKPOINTS)
    if not (config := _config_of(folder)):
        return False
    exported = not config["checkpoint"]["save_final"] or (folder / run_folder.FINAL).exists()
    return bool(saved) and (run_folder.step_of(saved[-1]) < config["trainer"]["steps"] or not exported)


def ended_early(folder: Path) -> bool:
    """Return whether a folder holds a run that has ended before its first checkpoint: nothing is left to go on with."""
    if not is_file(folder / run_folder.CONFIG) or (folder / run_folder.MODELS).exists():
        return False
    if not (config := _config_of(folder)):
        return False
    saves = config["checkpoint"]
    left = (folder / run_folder.FINAL).exists() or run_folder.checkpoints_in(folder / run_folder.CHECKPOINTS)
    return bool(saves["every"] or saves["save_final"]) and not left and not run_folder.is_going_on(folder)


def _config_of(folder: Path) -> dict[str, Any]:
    """The config of a run; empty where the file is damaged, or that of another program."""
    try:
        found = yaml.safe_load((folder / run_folder.CONFIG).read_text(encoding="utf-8"))
        return found if found["checkpoint"].keys() and found["trainer"].keys() else {}
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _last(argv: Iterable[str], key: str) -> str | None:
    """The value of the last argument `key=value`, as Hydra takes it."""
    return next((one.partition("=")[2] for one in reversed([*argv]) if one.startswith(f"{key}=")), None)


def _without(argv: Iterable[str], *keys: str) -> list[str]:
    return [one for one in argv if not one.startswith(tuple(f"{key}=" for key in keys))]
