"""Which run `resume=auto` goes on with, and what a fork begins with, with a rank that only writes a checkpoint."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from command import ROOT
from inside import in_folder
from tiny import make_stand_in

from sapo_rl import run_folder

RANK = """
import json, os, pathlib, sys, yaml
from sapo_rl import run_folder
from sapo_rl.policy import manifest
folder = pathlib.Path(sys.argv[1])
text = (folder / "config.yaml").read_text()
saved = run_folder.checkpoints_in(folder / "checkpoints")
done = run_folder.step_of(saved[-1]) if saved else 0
steps = yaml.safe_load(text)["trainer"]["steps"]
kept = [json.loads(line) for line in (folder / "metrics.jsonl").open()] if saved else []
kept = [one for one in kept if one["step"] <= done]
(folder / "completions").mkdir(exist_ok=True)
for step in range(done + 1, min(done + int(os.environ["STEPS"]), steps) + 1):
    kept.append({"step": step, "time": 1.0 * step, "time/step": 1.0, "reward/mean": 0.5})
    (folder / f"completions/step_{step:05d}.parquet").write_text("rows")
    checkpoint = folder / f"checkpoints/step_{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": step, "updates": step, "state": {"config": text}}))
    manifest.write_manifest(checkpoint, step, {"state.json": manifest.entry_of(checkpoint / "state.json")})
    if step == steps:
        (folder / "final").mkdir()
(folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\\n" for one in kept))
(folder / "begun").open("a").write(f"after {done}\\n")
"""
FIRST, NOTHING = "resume=auto: goes on with", "resume=auto: there is no run to go on with; a new one begins"


def sapo_train(here: Path, *arguments: str, steps: int = 2, code: int = 0) -> str:
    """Run the command line; each start makes `steps` steps at most. Return what it told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sapo_rl.run.launch.command", lambda _, folder: [sys.executable, "stand_in.py", str(folder)])
        done = in_folder(*arguments, cwd=here, STEPS=str(steps), COLUMNS="300", PYTHONPATH=str(ROOT))
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def prepare(folder: Path) -> Path:
    """Write a recipe, and a module that stands in for the ranks."""
    make_stand_in(folder / "model")
    (folder / "mine.yaml").write_text("defaults: [quickstart, _self_]\nmodel: {path: model}\ntrainer: {steps: 5}\n")
    (folder / "stand_in.py").write_text(RANK)
    return folder


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a recipe."""
    return prepare(tmp_path)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and a run of four steps."""
    folder = prepare(tmp_path_factory.mktemp("begun"))
    sapo_train(folder, "config=mine.yaml", steps=4)
    (folder / "bad.yaml").write_text("resume: auto\n")
    return folder


def runs(here: Path) -> dict[str, int]:
    """The last checkpoint of each run, by its folder, oldest first."""
    folders = sorted(path for path in (here / "runs/mine").iterdir() if not path.is_symlink())
    saved = {path.name: run_folder.checkpoints_in(path / "checkpoints") for path in folders}
    return {name: run_folder.step_of(found[-1]) if found else 0 for name, found in saved.items()}


def test_auto_goes_on_until_the_run_is_complete_and_then_begins_a_new_one(here: Path) -> None:
    again = ("config=mine.yaml", "seed=3", "resume=auto")
    assert NOTHING in sapo_train(here, *again)
    ((first, done),) = runs(here).items()
    assert done == 2
    assert f"{FIRST} runs/mine/{first}" in sapo_train(here, *again, "launch.timeout=99", "logging.wandb=off")
    assert f"{FIRST} runs/mine/{first}" in sapo_train(here, *again)  # what changes nothing of the run may differ
    assert runs(here) == {first: 5}
    config = yaml.safe_load((here / f"runs/mine/{first}/config.yaml").read_text())
    assert (config["seed"], config["launch"]["timeout"]) == (3, 99)
    assert NOTHING in sapo_train(here, *again)
    assert list(runs(here).values()) == [5, 2]


def test_auto_takes_runs_by_the_same_settings_alone_and_none_that_is_going_on(here: Path) -> None:
    for seed in (1, 2):
        sapo_train(here, "config=mine.yaml", f"seed={seed}")
    first, second = runs(here)
    assert f"{FIRST} runs/mine/{first}" in sapo_train(here, "resume=auto", "config=mine.yaml", "seed=1", steps=1)
    with run_folder.locked(here / "runs/mine" / second):
        assert NOTHING in sapo_train(here, "config=mine.yaml", "seed=2", "resume=auto", steps=0)
    assert list(runs(here).values()) == [3, 2, 0]
    # The last has no checkpoint to go on from.
    assert f"{FIRST} runs/mine/{second}" in sapo_train(here, "config=mine.yaml", "seed=2", "resume=auto", steps=1)
    assert list(runs(here).values()) == [3, 3, 0]


def test_auto_goes_on_in_the_folder_that_is_asked_for(here: Path) -> None:
    for _ in range(2):
        sapo_train(here, "config=mine.yaml", "resume=auto", "run_dir=out/first")
    assert (here / "out/first/begun").read_text().split("\n") == ["after 0", "after 2", ""]
    assert not (here / "runs").exists()


def test_auto_begins_anew_in_the_place_of_a_run_that_ended_before_its_first_checkpoint(here: Path) -> None:
    again = ("config=mine.yaml", "resume=auto", "run_dir=out/first")
    for number in ("", "-2"):
        sapo_train(here, *again, steps=0)
        told = sapo_train(here, *again, "dry_run=true")
        assert NOTHING in told and not (here / f"out/first-ended{number}").exists()
        told = sapo_train(here, *again, steps=0)
        assert f"ended before its first checkpoint; it is out/first-ended{number} now" in told
        assert (here / f"out/first-ended{number}/config.yaml").is_file()
        shutil.rmtree(here / "out/first")
    sapo_train(here, *again)
    assert FIRST in sapo_train(here, *again)  # now there is one
    kept = "'out/first' is not empty; name a new folder; resume=out/first goes on with it"
    assert kept in sapo_train(here, "config=mine.yaml", "run_dir=out/first", code=2)
    with run_folder.locked(here / "out/first"):
        shutil.rmtree(here / "out/first/checkpoints")
        assert kept in sapo_train(here, *again, code=2)


def test_auto_tells_where_the_folder_cannot_be_moved_aside_such_as_a_mount_point(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(self: Path, target: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    again = ("config=mine.yaml", "resume=auto", "run_dir=out")
    sapo_train(here, *again, steps=0)
    monkeypatch.setattr(Path, "replace", busy)
    told = sapo_train(here, *again, code=2)
    aside = "'out' holds a run that ended before its first checkpoint and cannot be moved aside (Device or resource"
    assert f"run_dir (command line): {aside} busy); empty it, or name a folder in it" in told


def test_a_run_folder_that_cannot_be_made_is_told_with_its_key(here: Path) -> None:
    for place, why in {"mine.yaml": "File exists", "mine.yaml/x": "Not a directory"}.items():
        told = sapo_train(here, "config=mine.yaml", "resume=auto", f"run_dir={place}", code=2)
        assert f"run_dir (command line): '{place}' cannot be made a folder: {why}\n" in told


def test_auto_leaves_alone_what_is_no_run_and_the_folder_that_it_is_started_in(here: Path) -> None:
    again = ("config=mine.yaml", "resume=auto")
    sapo_train(here, *again, "run_dir=out/first", steps=0)
    shutil.copy(here / "out/first/config.yaml", here)
    assert "'.' is not empty; name a new folder" in sapo_train(here, *again, "run_dir=.", code=2)
    for text in ("a: 1", "a: [", "- 1", "checkpoint: 2", ""):
        (here / "out/first/config.yaml").write_text(text)
        assert "'out/first' is not empty" in sapo_train(here, *again, "run_dir=out/first", code=2)


def test_auto_says_in_a_dry_run_what_it_would_do(here: Path) -> None:
    dry = ("config=mine.yaml", "resume=auto", "dry_run=true")
    assert NOTHING in sapo_train(here, *dry)
    assert not (here / "runs").exists()
    sapo_train(here, "config=mine.yaml")
    (here / "mine.yaml").write_text((here / "mine.yaml").read_text().replace("steps: 5", "steps: 9"))
    shown = sapo_train(here, *dry)
    (run,) = runs(here)
    assert f"{FIRST} runs/mine/{run}" in shown and f"step 2, update 2: runs/mine/{run}/checkpoints/step_000002" in shown
    assert "3 of 5 steps" in shown  # a run goes on with the config that it has


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["config=mine.yaml", "resume=auto", "seed=1,2", "-m"], "resume=auto is for one run, not for a sweep (-m)"),
        (["config=none.yaml", "resume=auto"], "config: no file 'none.yaml'"),
        (["config=mine.yaml", "step=2"], "step (command line): is 2; goes with fork="),
        (["config=mine.yaml", "fork=RUN"], "fork continues with the config of its run folder: leave config= out"),
        (["fork=RUN", "resume=RUN"], "fork begins a run of its own: leave resume out"),
        (["fork=nowhere"], "fork: 'nowhere' is no run folder"),
        (["fork=RUN", "step=7"], "step (command line): 'RUN' has no checkpoint of step 7; valid: 1, 2, 3, 4"),
        (["fork=RUN", "step=4", "trainer.steps=4"], "trainer.steps (command line): is 4, and the run to fork from has"),
        (["fork=RUN", "seed=4"], "seed (command line): is 4, but the run was begun with 0"),
        (["config=bad.yaml"], "resume (bad.yaml): belongs on the command line: sapo-train resume=auto"),
    ],
)
def test_what_does_not_go_together_is_told(begun: Path, arguments: list[str], told: str) -> None:
    (run,) = runs(begun)
    shown = sapo_train(begun, *(one.replace("RUN", f"runs/mine/{run}") for one in arguments), code=2)
    assert f"sapo-train: {told.replace('RUN', f'runs/mine/{run}')}" in shown, shown
    assert list(runs(begun)) == [run]


def test_a_fork_is_a_run_of_its_own_that_begins_at_an_older_step(here: Path) -> None:
    sapo_train(here, "config=mine.yaml", "trainer.learning_rate=1e-6", steps=4)
    (old,) = runs(here)
    source = here / "runs/mine" / old
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    wanted = (f"fork=runs/mine/{old}", "step=2", "trainer.learning_rate=2e-6")
    shown = sapo_train(here, *wanted, "dry_run=true")
    table = " ".join(shown.split())
    assert f"step 2, update 2: runs/mine/{old}/checkpoints/step_000002" in table and "3 of 5 steps" in table
    assert "trainer.learning_rate │ 1e-06 -> 2e-06" in table
    assert list(runs(here)) == [old]
    sapo_train(here, *wanted, steps=1)
    ((new, done),) = [pair for pair in runs(here).items() if pair[0] != old]
    assert done == 3 and {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    folder = here / "runs/mine" / new
    assert (folder / "begun").read_text() == "after 2\n"
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] == [1, 2, 3]
    assert sorted(path.name for path in (folder / "completions").iterdir()) == [
        f"step_0000{step}.parquet" for step in (1, 2, 3)
    ]
    assert (folder / "checkpoints/step_000002/state.json").stat().st_nlink == 2  # no second copy on the disk
    about = json.loads((folder / "environment.json").read_text())
    assert about["fork"] == {"run": f"runs/mine/{old}", "step": 2} and about["recipe"] == "mine"
    assert about["name"] == f"mine learning_rate=2e-6 {new}"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["learning_rate"] == 2e-6 and config["fork"] is None and config["step"] is None
    # It goes on as any other run, by its folder and by the same command.
    shutil.rmtree(source)
    sapo_train(here, f"resume=runs/mine/{new}", steps=1)
    assert runs(here) == {new: 4}


def test_a_fork_that_is_asked_for_again_goes_on_with_auto(here: Path) -> None:
    sapo_train(here, "config=mine.yaml")
    (old,) = runs(here)
    wanted = (f"fork=runs/mine/{old}", "step=1", "trainer.learning_rate=2e-6", "resume=auto")
    assert NOTHING in sapo_train(here, *wanted, steps=1)
    (new,) = [name for name in runs(here) if name != old]
    assert f"{FIRST} runs/mine/{new}" in sapo_train(here, *wanted, steps=1)
    assert runs(here) == {old: 2, new: 3}


def test_a_run_that_was_resumed_lends_its_config_without_the_resume(here: Path) -> None:
    sapo_train(here, "config=mine.yaml")
    (old,) = runs(here)
    sapo_train(here, f"resume=runs/mine/{old}")
    sapo_train(here, f"config=runs/mine/{old}/config.yaml", "run_dir=out", steps=1)
    assert runs(here) == {old: 4} and (here / "out/begun").read_text() == "after 0\n"


def test_machines_beside_the_first_leave_the_choice_to_it(here: Path) -> None:
    sapo_train(here, "config=mine.yaml")
    several = ("launch=ddp", "launch.num_machines=2", "launch.num_processes=2", "launch.main_process_ip=127.0.0.1")
    shown = sapo_train(here, "config=mine.yaml", "resume=auto", *several, "launch.machine_rank=1", "dry_run=true")
    assert "resume=auto" not in shown
