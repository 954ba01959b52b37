"""`sapo-eval` up to the start of vLLM: which models are meant, and what is told of mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from inside import kept_apart
from tiny import make_tiny_model, make_workspace

from sapo_rl.config import LoraConfig, ModelConfig
from sapo_rl.errors import UserError
from sapo_rl.policy import manifest
from sapo_rl.run import eval as command
from sapo_rl.run import packaged, subjects
from sapo_rl.run.subjects import Subject, labels, model_of, subject_at, subjects_of
from sapo_rl.run_folder import record

SECTION = {"path": "/models/base", "dtype": "float32", "revision": None, "lora": {"rank": 4, "target_modules": ["q"]}}


def make_run(folder: Path, model: Path, steps: tuple[int, ...] = (1, 2, 10), final: bool = True) -> Path:
    """What a run leaves, as far as it is looked at before weights are read."""
    folder.mkdir(parents=True)
    config = yaml.safe_dump({"model": SECTION, "trainer": {"steps": max(steps, default=0)}})
    (folder / "config.yaml").write_text(config)
    for step in steps:
        checkpoint = folder / "checkpoints" / f"step_{step:06d}"
        checkpoint.mkdir(parents=True)
        record = checkpoint / manifest.RECORD
        record.write_text(json.dumps({"step": step, "updates": step, "state": {"config": config}}))
        manifest.write_manifest(checkpoint, step, {record.name: manifest.entry_of(record)})
    if final:
        shutil.copytree(model, folder / "final")
    return folder


@pytest.fixture
def here(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(make_workspace(tmp_path, tiny_model))
    return tmp_path


def test_a_run_is_its_final_model_or_its_last_checkpoint(here: Path, tiny_model: Path) -> None:
    run = make_run(here / "runs/tiny/one", tiny_model)
    assert subject_at("runs/tiny/one") == Subject(
        "runs/tiny/one/final", 10, None, {"path": "runs/tiny/one/final"}, str(run)
    )
    shutil.rmtree(run / "final")
    last = "runs/tiny/one/checkpoints/step_000010"
    assert subject_at("runs/tiny/one") == Subject(last, 10, last, SECTION, str(run))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=r"^model: the run 'runs/tiny/one' has neither final/ nor a checkpoint yet$"):
        subject_at("runs/tiny/one")


def test_the_newest_run_of_a_recipe_is_found_by_its_link(here: Path, tiny_model: Path) -> None:
    make_run(here / "runs/tiny/one", tiny_model)
    (here / "runs/tiny/latest").symlink_to("one")
    assert {subject_at(path).path for path in ("runs/tiny", "runs/tiny/latest")} == {"runs/tiny/one/final"}


def test_a_folder_of_checkpoints_is_all_of_them_in_order(here: Path, tiny_model: Path) -> None:
    run = make_run(here / "runs/tiny/one", tiny_model)
    for named in ("runs/tiny/one/checkpoints", "runs/tiny/one/checkpoints/*", "[runs/tiny/one/checkpoints]"):
        assert [one.step for one in subjects_of([named])] == [1, 2, 10]
    (run / "checkpoints/step_000010").rename(run / "checkpoints/step_10")
    (run / "checkpoints/step_000002").rename(run / "checkpoints/step_2")
    assert [one.step for one in subjects_of(["runs/tiny/one/checkpoints/step_*0"])] == [10]


def test_several_are_named_by_commas_and_names_of_the_hub_are_left_alone(here: Path, tiny_model: Path) -> None:
    found = subjects_of([f"{tiny_model},org/name", "other/one"])
    assert [one.path for one in found] == [str(tiny_model), "org/name", "other/one"]
    assert found[1].overrides == ["++model.path='org/name'"]
    assert labels(found[:2]) == [tiny_model.name, "name"]


def test_a_model_that_is_made_at_its_first_use_goes_by_its_name(
    here: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "cache", lambda: here / "cache")
    made = here / "cache/models/SmolLM2-135M-Instruct"
    assert subject_at("smollm2-135m").path == str(made) and not made.exists()
    shutil.copytree(tiny_model, made)
    assert subject_at("smollm2-135m").model == {"path": str(made)}
    shutil.copytree(tiny_model, here / "smollm2-135m")
    assert subject_at("smollm2-135m").path == "smollm2-135m"


@pytest.mark.parametrize("named", ["./nowhere", "runs/tiny/gone/checkpoints/step_1", "nowhere*"])
def test_what_is_not_there_is_told(here: Path, named: str) -> None:
    with pytest.raises(UserError, match=r"^model: "):
        subjects_of([named])


def test_a_damaged_checkpoint_is_told_without_advice_on_resuming(here: Path, tiny_model: Path) -> None:
    run = make_run(here / "runs/tiny/one", tiny_model)
    record = run / "checkpoints/step_000002/state.json"
    record.write_text(record.read_text() + " ")
    with pytest.raises(UserError, match=rf"^'{record}' cannot be used: it has \d+ bytes, and \d+ were written$"):
        subject_at(str(record.parent))


def test_a_checkpoint_under_another_name_and_a_link_to_none_are_told(here: Path, tiny_model: Path) -> None:
    saved = make_run(here / "runs/tiny/one", tiny_model) / "checkpoints"
    (saved / "best").symlink_to("step_000002")
    assert subject_at(str(saved / "best")).step == 2
    (saved / "step_000002").rename(here / "mine")
    with pytest.raises(UserError, match=rf"^model: '{saved}/best' leads to '{saved}/step_000002', which is not there$"):
        subject_at(str(saved / "best"))
    with pytest.raises(UserError, match=r"^'mine/manifest.json' cannot be used: .* step_NUMBER, not 'mine'$"):
        subject_at("mine")


def test_the_results_of_a_run_lie_under_its_recipe_wherever_it_is(here: Path, tiny_model: Path) -> None:
    run = make_run(here / "elsewhere/one", tiny_model)
    shutil.copy(here / "tiny.yaml", run / "config.yaml")
    (run / record.ENVIRONMENT).write_text(json.dumps({record.RECIPE: "tiny"}))
    assert plan(f"model={run}").name == "tiny"


def test_the_model_section_of_a_checkpoint_is_that_of_its_run(here: Path, tiny_model: Path) -> None:
    run = make_run(here / "runs/tiny/one", tiny_model)
    (one,) = subjects_of([str(run / "checkpoints/step_000001")])
    assert sorted(one.overrides) == [
        "++model.dtype='float32'",
        "++model.lora.rank=4",
        '++model.lora.target_modules=["q"]',
        "++model.path='/models/base'",
        "++model.revision=null",
    ]
    whole = ModelConfig(path="/models/base", lora=LoraConfig(rank=4, target_modules=["q"]))
    (back,) = subjects.loads(subjects.dumps([one], [whole]))
    assert model_of(back) == whole and (back.step, back.checkpoint) == (1, one.checkpoint)


def test_models_are_told_apart_by_the_ends_of_their_paths() -> None:
    paths = ("runs/a/final", "runs/b/final", "runs/b/checkpoints/step_000001")
    assert labels([Subject(path) for path in paths]) == ["a/final", "b/final", "checkpoints/step_000001"]
    assert labels([Subject("runs/a/final")]) == ["final"]


def plan(*arguments: str) -> command.Plan:
    with kept_apart():
        return command.plan(arguments)


def test_settings_of_a_training_are_left_aside_unless_they_are_typed(here: Path, tiny_model: Path) -> None:
    given = ("config=tiny.yaml", f"model={tiny_model}", "launch=ddp", "launch.num_processes=3")
    found = plan(*given, "rollout.servers=[127.0.0.1:8000]")
    assert found.config.rollout.gpu_memory_utilization == 0.9 and found.config.rollout.sleep == "0"
    assert found.config.rollout.servers == ["127.0.0.1:8000"]  # typed
    assert found.config.launch.num_processes == 3  # a training could not cut its batch so
    assert plan(*given[:2], "launch=fsdp2", "launch.num_processes=2").config.launch.profile == "ddp"
    assert found.name == "tiny" and found.config.model.path == str(tiny_model)


def test_without_a_recipe_sets_alone_are_measured(here: Path, tiny_model: Path) -> None:
    lengths = ("rollout.max_completion_tokens=32", "data.max_prompt_tokens=64")
    found = plan(f"model={tiny_model}", "eval.sets=[gsm8k]", "eval.sets.gsm8k.data.max_prompt_tokens=300", *lengths)
    assert (found.config.eval.prompts, list(found.config.eval.sets), found.name) == (0, ["gsm8k"], tiny_model.name)


def test_a_run_is_measured_by_its_own_config(here: Path, tiny_model: Path) -> None:
    run = make_run(here / "runs/tiny/one", tiny_model, final=False)
    content: dict[str, Any] = yaml.safe_load((here / "tiny.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    last = run / "checkpoints/step_000010"
    found = plan(f"model={run}", f"model.path={tiny_model}", "model.lora.rank=0")
    assert (found.config.data.size, found.name) == (100, "tiny")
    (one,) = subjects.loads(found.whole)
    assert (one.checkpoint, one.model["path"], one.model["dtype"]) == (str(last), str(tiny_model), "float32")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=MODEL"], ["eval.sets: names no set", "config=NAME"]),
        (["eval.sets=[gsm8k]"], ["model= or config= must be given"]),
        (["model=./nowhere", "eval.sets=[gsm8k]"], ["model: './nowhere' is no run"]),
        (["model=MODEL", "config=tiny.yaml", "eval.prompts=0"], ["eval.sets: names no set"]),
        (["model=MODEL", "config=tiny.yaml", "eval.sets=[gsm8]"], ["eval.sets.gsm8 (command line)", "'gsm8k'"]),
        (
            ["model=MODEL", "config=tiny.yaml", "eval.samplez=1"],
            ["eval.samplez (command line): no such key", "samples"],
        ),
        (
            ["model=MODEL", "config=tiny.yaml", "rollout.temperature=9"],
            ["rollout.temperature (command line)", "at most 2"],
        ),
        (["model=MODEL", "config=tin.yaml"], ["config: no file 'tin.yaml'"]),
        (["model=MODEL", "resume=runs/tiny"], ["resume (command line): is for sapo-train"]),
        (["model=MODEL", "check=chat"], ["check (command line): is for sapo-train"]),
        (["model=MODEL", "--multirun"], ["'--multirun' (command line) cannot be read as key=value"]),
    ],
)
def test_a_mistake_is_told_in_two_lines(
    here: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    with kept_apart(), pytest.raises(SystemExit) as stopped:
        command.main([one.replace("MODEL", str(tiny_model)) for one in arguments])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.startswith("sapo-eval: ") and len(told.splitlines()) <= 2, told
    assert all(word in told for word in words), told
    assert not (here / "evals").exists()


def test_a_dry_run_shows_models_and_sets_and_leaves_nothing(
    here: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "own.jsonl").write_text('{"prompt": "What is 1?", "answer": "1"}\n')
    own = "eval.sets.own={data: {path: own.jsonl}, samples: 4}"
    with kept_apart():
        command.main([f"model={tiny_model}", "config=tiny.yaml", own, "dry_run=true", "eval.prompts=8"])
    shown = capsys.readouterr().out
    assert "64 prompts" not in shown and "8 prompts, greedily" in shown and "1 prompts, greedily and 4 samples" in shown
    assert not (here / "evals").exists()


def test_the_usage_names_the_sets(capsys: pytest.CaptureFixture[str]) -> None:
    command.main([])
    shown = capsys.readouterr().out
    assert "sapo-eval model=PATH" in shown and "gsm8k" in shown and "reasoning_gym/TASK" in shown


def test_models_of_one_shape_share_an_engine_and_others_do_not(tmp_path: Path, tiny_model: Path) -> None:
    from sapo_rl.policy.model import load_tokenizer
    from sapo_rl.run.evaluating import Candidate

    def kind(folder: Path, **changes: Any) -> str:
        model = ModelConfig(path=str(folder), **changes)
        return Candidate(0, "", Subject(str(folder)), model, load_tokenizer(model)).kind

    other_weights, other_shape = make_tiny_model(tmp_path / "a", seed=1), make_tiny_model(tmp_path / "b", seed=2)
    shape = json.loads((other_shape / "config.json").read_text())
    (other_shape / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 1}))
    assert kind(tiny_model) == kind(other_weights)
    assert len({kind(tiny_model), kind(other_shape), kind(tiny_model, dtype="float32")}) == 3
