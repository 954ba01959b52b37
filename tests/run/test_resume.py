"""What a resume may change, as the command line says before anything is started."""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from inside import in_folder as sapo_train
from tiny import make_stand_in

from sapo_rl import run_folder
from sapo_rl.errors import UserError
from sapo_rl.policy import manifest
from sapo_rl.run.checks import ConfigError
from sapo_rl.run.compose import loads
from sapo_rl.run.resume import plan

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the quickstart in `run`, of which ten of thirty steps are done, as far as the command line looks."""
    folder = tmp_path_factory.mktemp("workspace")
    make_stand_in(folder / "model")
    make_stand_in(folder / "other")
    composed = sapo_train("config=quickstart", "model.path=./model", "--cfg", "job", "--resolve", cwd=folder)
    assert composed.returncode == 0, composed.stderr
    write_checkpoint(folder / "run", composed.stdout.replace("./model", str(folder / "model")))
    return folder


def write_checkpoint(run: Path, config: str) -> None:
    checkpoint = run / "checkpoints/step_000010"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").write_text(config)
    record = {"step": 10, "updates": 20, "state": {"config": config}}
    (checkpoint / "state.json").write_text(json.dumps(record))
    manifest.write_manifest(checkpoint, 10, {"state.json": manifest.entry_of(checkpoint / "state.json")})


def dry_run(workspace: Path, *changes: str) -> str:
    result = sapo_train("resume=run", "dry_run=true", *changes, cwd=workspace)
    assert result.returncode == 0, result.stderr
    return " ".join(result.stdout.split())


def test_dry_run_says_from_where_how_much_is_left_and_what_changes(workspace: Path) -> None:
    assert "from │ step 10, update 20: run/checkpoints/step_000010" in (shown := dry_run(workspace))
    assert "left │ 20 of 30 steps, 40 updates" in shown and "changes │ none" in shown
    more = "+reward.functions.x.function=exact_match"
    shown = dry_run(workspace, "trainer.learning_rate=3e-6", "trainer.steps=12", more)
    assert "left │ 2 of 12 steps, 4 updates" in shown
    assert "trainer.learning_rate │ 2e-05 -> 3e-06" in shown
    assert "trainer.steps │ 30 -> 12" in shown
    assert "reward.functions.x.function │ nothing -> exact_match" in shown


def test_dry_run_shows_a_long_path_whole(workspace: Path, tmp_path: Path) -> None:
    run = tmp_path / "a folder with the runs of several months" / ("long" * 30)
    write_checkpoint(run, (workspace / "run/config.yaml").read_text())
    result = sapo_train(f"resume={run}", "dry_run=true", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    cells = "".join("".join(line.split("│")[2:3]).strip() for line in result.stdout.splitlines())
    assert f"{run}/checkpoints/step_000010".replace(" ", "") in cells.replace(" ", "")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("model.path=./other", "/other, but the run was begun with /"),
        ("data.args.digits=2", "data.args (command line): is {'digits': 2}, but the run was begun with {'dig"),
        ("trainer.steps=5", "the run has made 10 steps of trainer.steps=5"),
    ],
)
def test_what_a_resume_cannot_change_is_refused_before_anything_is_written(
    workspace: Path, change: str, told: str
) -> None:
    before = (workspace / "run/config.yaml").read_text()
    result = sapo_train("resume=run", change, cwd=workspace)
    assert result.returncode == 2
    assert told in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert (workspace / "run/config.yaml").read_text() == before


def changed(config: str, **values: object) -> str:
    """The config with other values under dotted keys, in which `__` stands for the dot."""
    content = yaml.safe_load(config)
    for key, value in values.items():
        *sections, name = key.split("__")
        functools.reduce(lambda node, section: node[section], sections, content)[name] = value
    return yaml.safe_dump(content)


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({"model__lora__rank": 4}, "model.lora.rank: is 4, but the run was begun with 0"),
        ({"model__revision": "v2"}, "model.revision"),
        ({"data__source": "file"}, "data.source"),
        ({"data__size": 100}, "data.size"),
        ({"data__shuffle": False}, "data.shuffle"),
        ({"rollout__group_size": 4}, "rollout.group_size"),
        ({"seed": 1}, "seed"),
        ({"eval__prompts": 8}, "eval.prompts"),
        ({"data__eval_path": "test.jsonl"}, "data.eval_path"),
        ({"trainer__learning_rate": 1e-6, "trainer__schedule": "cosine", "trainer__updates_per_rollout": 4}, None),
        ({"rollout__batch_size": 128, "loss__name": "grpo", "loss__tau_pos": 2.0, "model__dtype": "float32"}, None),
        ({"eval__every": 1, "checkpoint__every": 1, "logging__wandb": "off", "launch__profile": "ddp"}, None),
    ],
)
def test_keys_that_a_resume_may_change_and_keys_that_it_may_not(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, object], refused: str | None
) -> None:
    monkeypatch.chdir(workspace)
    now = changed((workspace / "run/config.yaml").read_text(), resume="run", **values)
    if refused:
        with pytest.raises(ConfigError, match=rf"^{re.escape(refused)}"):
            plan(loads(now), now)
    else:
        assert plan(loads(now), now).changes.keys() == {key.replace("__", ".") for key in values}


@pytest.mark.parametrize("way", ["resume", "fork"])
def test_what_cannot_be_changed_is_told_of_a_resume_or_a_fork(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.chdir(workspace)
    now = changed((workspace / "run/config.yaml").read_text(), seed=1, **{way: "run"})
    with pytest.raises(ConfigError, match=f"^seed: is 1, but the run was begun with 0, and a {way} cannot change it"):
        plan(loads(now), now)


def test_a_run_without_a_checkpoint_is_going_on_or_has_ended(workspace: Path, tmp_path: Path) -> None:
    """Only to ask changes nothing of the lock: who holds it is still told."""
    now = changed((workspace / "run/config.yaml").read_text(), resume=str(tmp_path))
    with pytest.raises(UserError, match="the run ended before its first"):
        plan(loads(now), now)
    assert not (tmp_path / run_folder.LOCK).exists()
    with run_folder.locked(tmp_path):
        for _ in range(2):
            with pytest.raises(UserError, match=rf"is a run that is still going on \(process {os.getpid()} on "):
                plan(loads(now), now)
    held = (tmp_path / run_folder.LOCK).read_text()
    with pytest.raises(UserError, match="the run ended before its first"):
        plan(loads(now), now)
    assert (tmp_path / run_folder.LOCK).read_text() == held


def test_held_out_prompts_of_their_own_file_may_be_more_or_fewer(workspace: Path, tmp_path: Path) -> None:
    begun = changed((workspace / "run/config.yaml").read_text(), data__eval_path="a.jsonl")
    write_checkpoint(tmp_path / "run", begun)
    now = changed(begun, resume=str(tmp_path / "run"), data__eval_path="b.jsonl", eval__prompts=8)
    assert plan(loads(now), now).changes.keys() == {"data.eval_path", "eval.prompts"}


def test_the_config_of_the_checkpoint_counts_not_one_that_was_edited_since(workspace: Path, tmp_path: Path) -> None:
    config = (workspace / "run/config.yaml").read_text()
    write_checkpoint(tmp_path / "run", config)
    edited = yaml.safe_load(config) | {"seed": 3}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(edited | {"model": {"path": str(workspace / "model")}}))
    result = sapo_train("resume=run", cwd=tmp_path)
    assert result.returncode == 2
    assert "seed (run/config.yaml): is 3, but the run was begun with 0" in result.stderr


def test_a_model_that_has_moved_may_be_named_anew(workspace: Path, tmp_path: Path) -> None:
    gone = (workspace / "run/config.yaml").read_text().replace(str(workspace / "model"), "/gone/model")
    write_checkpoint(tmp_path / "run", gone)
    assert "model.path │ /gone/model -> " in dry_run(tmp_path, f"model.path={workspace / 'model'}")


def test_a_damaged_record_is_refused_before_anything_is_started(workspace: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", (workspace / "run/config.yaml").read_text().replace("./model", "../model"))
    record = tmp_path / "run/checkpoints/step_000010/state.json"
    record.write_text(record.read_text().replace('"updates": 20', '"updates": 10'))
    result = sapo_train("resume=run", f"model.path={workspace / 'model'}", cwd=tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "step_000010/state.json' cannot be used: it is damaged" in result.stderr


def test_a_manifest_that_lacks_something_is_called_damaged(workspace: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", (workspace / "run/config.yaml").read_text())
    file = tmp_path / "run/checkpoints/step_000010/manifest.json"
    file.write_text(file.read_text().replace('"checksum"', '"chexksum"'))
    with pytest.raises(UserError, match=r"manifest\.json' cannot be used: it is damaged: KeyError\('checksum'\); "):
        manifest.read_record(file.parent)
