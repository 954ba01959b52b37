"""What a user names as a model: a folder, a name on the hub, a run, or a checkpoint of one. Imports no torch."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sapo_rl import run_folder
from sapo_rl.config import LoraConfig, ModelConfig
from sapo_rl.config.nested import leaves
from sapo_rl.errors import UserError
from sapo_rl.errors.files import expand
from sapo_rl.policy import manifest, model_folder
from sapo_rl.run import compose, packaged


@dataclass(frozen=True)
class Subject:
    """A model that is named.

    Example:
        >>> subject_at("runs/mine/latest/checkpoints/step_000050").step
        50
    """

    path: str
    """The folder, or the name on the hub."""
    step: int = 0
    """The training step of its weights; 0 where it is not known."""
    checkpoint: str | None = None
    """The folder of the checkpoint, where it is one."""
    model: dict[str, Any] = field(default_factory=dict)
    """Its keys of the section `model`, those of the run that it is of; a model folder has `path` alone."""
    run: str | None = None
    """The folder of that run."""

    @property
    def overrides(self) -> list[str]:
        """What makes its section `model` that of a config."""
        return [f"++model.{key}={compose.as_override(value)}" for key, value in leaves(self.model)]


def subjects_of(values: Iterable[str]) -> list[Subject]:
    """Return the models that arguments `model=VALUE` name: one, several by commas, `*` for those that match.

    Raises:
        UserError: there is no such thing.
    """
    named = [one for value in values for one in value.strip("[]").split(",") if one.strip()]
    return [subject for one in named for subject in _subjects_at(one.strip())]


def _subjects_at(named: str) -> list[Subject]:
    if re.search(r"[*?]", named):
        found = sorted(glob.glob(str(expand(named))), key=_by_number)
        if not found:
            raise UserError(f"model: nothing is called '{named}'")
        return list({one.path: one for one in map(subject_at, found)}.values())  # a link and what it leads to are one
    checkpoints = run_folder.checkpoints_in(expand(named)) if expand(named).is_dir() else []
    return [subject_at(str(one)) for one in checkpoints] or [subject_at(named)]


def _by_number(path: str) -> tuple[str | int, ...]:
    """What sorts step_9 before step_10."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path))


def subject_at(named: str) -> Subject:
    """Return the model at a path or name; of a run its final model, or else its last checkpoint.

    Raises:
        UserError: nothing is there, or it is damaged.
    """
    if packaged.missing(named):
        return Subject(named, model={"path": named})
    folder = expand(named)
    if folder.name == run_folder.BEST and folder.is_symlink():
        folder = folder.parent / folder.readlink()
        if not folder.exists():
            raise UserError(f"model: '{named}' leads to '{folder}', which is not there")
    if not folder.exists() and (made := packaged.folder_of(named)):
        return subject_at(str(made))
    if (folder / manifest.MANIFEST).is_file():
        return _of_checkpoint(folder)
    if (folder / model_folder.CONFIG).is_file():
        return _of_folder(folder)
    if (folder / run_folder.CONFIG).is_file() or (folder / run_folder.LATEST / run_folder.CONFIG).is_file():
        return _of_run(run_folder.locate(named))
    if model_folder.looks_local(named) or folder.exists():
        raise UserError(f"model: '{named}' is no run, no checkpoint and no folder with a Hugging Face model")
    return Subject(named, model={"path": named})


def _of_run(folder: Path) -> Subject:
    if (folder / run_folder.FINAL).is_dir():
        return _of_folder(folder / run_folder.FINAL)
    checkpoints = run_folder.checkpoints_in(folder / run_folder.CHECKPOINTS)
    if not checkpoints:
        raise UserError(f"model: the run '{folder}' has neither {run_folder.FINAL}/ nor a checkpoint yet")
    return _of_checkpoint(checkpoints[-1])


def _of_folder(folder: Path) -> Subject:
    """A Hugging Face folder; one that a run has left at its end is of the run's last step."""
    run, step = folder.resolve().parent, 0
    of_run = folder.resolve().name == run_folder.FINAL and (run / run_folder.CONFIG).is_file()
    if of_run:
        step = yaml.safe_load((run / run_folder.CONFIG).read_text(encoding="utf-8"))["trainer"]["steps"]
    return Subject(str(folder), step, model={"path": str(folder)}, run=str(run) if of_run else None)


def _of_checkpoint(folder: Path) -> Subject:
    try:
        record = manifest.read_record(folder)
        model = yaml.safe_load(record["state"]["config"])["model"]
    except UserError as error:
        raise damaged(error) from error
    run = folder.resolve().parent.parent
    return Subject(str(folder), record["step"], str(folder), model, str(run))


def damaged(error: UserError) -> UserError:
    """Return what is told of a damaged checkpoint where it is not about to be resumed."""
    return UserError(re.sub(r"^resume: |; (move '.*|it is the only one: start anew)$", "", str(error)))


def labels(subjects: Sequence[Subject]) -> list[str]:
    """Return a short name for each: the end of its path, with as many folders as tell them apart."""
    parts = [Path(subject.path).parts for subject in subjects]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len({subject.path for subject in subjects}):
            return names
    return [subject.path for subject in subjects]


def dumps(subjects: Sequence[Subject], models: Sequence[ModelConfig]) -> str:
    """Return the subjects as JSON, each with its whole section `model`."""
    whole = [asdict(one) | {"model": asdict(own)} for one, own in zip(subjects, models, strict=True)]
    return json.dumps(whole, indent=1)


def loads(text: str) -> list[Subject]:
    """Undo `dumps`."""
    return [Subject(**one) for one in json.loads(text)]


def model_of(subject: Subject) -> ModelConfig:
    """Return the section `model` of a subject; keys that it does not have are as by default."""
    keys: dict[str, Any] = subject.model | {"lora": LoraConfig(**subject.model.get("lora", {}))}
    return ModelConfig(**keys)
