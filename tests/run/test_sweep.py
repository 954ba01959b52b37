"""Sweeps and chosen run folders, with a rank that does nothing but write the numbers of a run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import command
import pytest
import yaml
from inside import in_folder
from tiny import make_stand_in

ROOT = Path(__file__).parents[2]
RANK = """
import json, pathlib, sys, yaml
folder = pathlib.Path(sys.argv[1])
tau = yaml.safe_load((folder / "config.yaml").read_text())["loss"]["tau_neg"]
if tau == 7:
    sys.exit(1)
lines = [{"step": step, "time": 60.0 * step, "eval/reward": score} for step, score in ((0, tau / 4), (1, 0.25))]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


def stand_in(_: object, folder: object) -> list[str]:
    """The command of a rank that is none."""
    return [sys.executable, "stand_in.py", str(folder)]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a recipe, and a module that stands in for the ranks."""
    make_stand_in(tmp_path / "model")
    (tmp_path / "mine.yaml").write_text("defaults: [quickstart, _self_]\nmodel: {path: model}\n")
    (tmp_path / "stand_in.py").write_text(RANK)
    starter = "import sys; from sapo_rl.run import launch, cli\n"
    starter += "launch.command = lambda _, folder: [sys.executable, 'stand_in.py', str(folder)]\ncli.main()\n"
    (tmp_path / "start.py").write_text(starter)
    return tmp_path


def test_each_run_of_a_sweep_is_told_apart(here: Path) -> None:
    swept = ("loss.tau_neg=1.0,1.2,7,0.5", "trainer.steps=1", "-m")
    program = ("start.py",)
    result = command.sapo_train("config=mine.yaml", "run_dir=out/sweep", *swept, cwd=here, program=program)
    assert result.returncode == 2, result.stderr
    lines = result.stdout.splitlines()
    titles = [f"[{number}/4] loss.tau_neg={tau}" for number, tau in enumerate(("1.0", "1.2", "7", "0.5"), start=1)]
    assert lines[:4] == titles
    table = [line.split() for line in lines[-5:]]
    assert table[0][:1] == ["loss.tau_neg"]
    assert table[1] == ["1", "1.0", "0.250", "0.250", "1m00s", "out/sweep/1"]
    assert table[2] == ["2", "1.2", "0.250", "0.300", "1m00s", "out/sweep/2"]
    assert table[3] == ["3", "7", "-", "-", "-", "out/sweep/3,", "exit", "code", "1"]
    assert table[4] == ["4", "0.5", "-", "-", "-", "exit", "code", "2"]
    for number, tau in ((1, "1.0"), (2, "1.2")):
        typed = yaml.safe_load((here / f"out/sweep/{number}/overrides.yaml").read_text())
        assert typed == ["config=mine.yaml", "run_dir=out/sweep", f"loss.tau_neg={tau}", "trainer.steps=1"]
    about = [json.loads((here / f"out/sweep/{number}/environment.json").read_text()) for number in (1, 2, 3)]
    assert [one["name"] for one in about] == ["mine tau_neg=1.0 1", "mine tau_neg=1.2 2", "mine tau_neg=7 3"]
    (sweep,) = {one["sweep"] for one in about}
    assert re.fullmatch(r"sweep \d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", sweep)
    assert not (here / "out/latest").exists() and not (here / "runs/mine").exists()


def test_recipes_of_a_sweep_are_named_as_they_were_typed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sapo_rl.run.launch.command", stand_in)
    (here / "other.yaml").write_text((here / "mine.yaml").read_text())
    result = in_folder("config=mine.yaml,other.yaml", "+reward.functions.b.function=numeric_digits", "-m", cwd=here)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("[")] == [
        "[1/2] config=mine.yaml",
        "[2/2] config=other.yaml",
    ]
    typed = yaml.safe_load((here / "runs/other/latest/overrides.yaml").read_text())
    assert typed == ["config=other.yaml", "+reward.functions.b.function=numeric_digits"]


def test_the_run_folder_can_be_chosen(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sapo_rl.run.launch.command", stand_in)
    (here / "a folder/lost+found").mkdir(parents=True)  # as a disk of its own has it
    for _ in range(2):
        result = in_folder("config=mine.yaml", f"run_dir={here}/a folder", cwd=here)
        if result.returncode:
            break
        config = yaml.safe_load((here / "a folder/config.yaml").read_text())
        assert config["run_dir"] is None and config["model"]["path"] == str(here / "model")
        assert not (here / "runs").exists() and not (here / "latest").exists()
    told = f"sapo-train: run_dir (command line): '{here}/a folder' is not empty; name a new folder; 'resume={here}/a fo"
    assert result.returncode == 2 and result.stderr.startswith(told), result.stderr
    result = in_folder(f"resume={here}/a folder", "run_dir=other", cwd=here)
    assert result.returncode == 2 and "run_dir (command line): a run that is resumed stays" in result.stderr
    result = in_folder("config=mine.yaml", "hydra.run.dir=other", cwd=here)
    assert result.returncode == 2 and "run_dir=PATH chooses the run folder" in result.stderr
    again = in_folder(f"config={here}/a folder/config.yaml", cwd=here)  # which does not ask for the same folder
    assert again.returncode == 0, again.stderr
