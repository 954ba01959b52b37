"""`train()` from Python, up to where a training would start: what it refuses, and what it makes of its arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny import make_workspace

from sapo_rl.config import Config
from sapo_rl.errors import UserError
from sapo_rl.run.api import Run, train
from sapo_rl.telemetry.sinks.tokens import write_tokens
from sapo_rl.types import Place, Row, TokenValues


@pytest.fixture
def workspace(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, which is the current one; runs end before they train."""
    make_workspace(tmp_path, tiny_model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sapo_rl.run.launch.command", lambda settings, folder: [sys.executable, "-c", ""])
    return tmp_path


def config_of(run: Run) -> dict[str, Any]:
    return yaml.safe_load((run.folder / "config.yaml").read_text())


def test_the_package_has_train_and_is_cheap_to_import() -> None:
    code = (
        "import sys, sapo_rl; assert not {'torch', 'hydra', 'pandas'} & {*sys.modules}; "
        "from sapo_rl import Config, Run, train; assert callable(train) and Config.__module__ == 'sapo_rl.config'; "
        "assert 'torch' not in sys.modules and 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_a_mapping_and_a_config_say_the_same(workspace: Path) -> None:
    by_file = train("tiny.yaml", ["seed=5", "trainer.steps=7"])
    mapping = yaml.safe_load((workspace / "tiny.yaml").read_text())
    by_mapping = train(mapping, ["seed=5", "trainer.steps=7"])
    config = Config()
    config.model.path = mapping["model"]["path"]
    config.data.source, config.data.max_prompt_tokens = "arithmetic", 64
    by_config = train(config, rewards=["numeric_answer"])
    assert by_file.folder.parent.name == "tiny" and by_mapping.folder.parent.name == "python"
    assert config_of(by_file) == config_of(by_mapping)
    assert config_of(by_file)["trainer"]["steps"] == 7
    assert config_of(by_config)["model"]["path"] == mapping["model"]["path"]
    assert by_file.final is None


def test_rows_are_kept_by_their_content(workspace: Path) -> None:
    rows = [{"prompt": f"{number}?", "answer": str(number)} for number in range(30)]
    first = config_of(train("tiny.yaml", dataset=rows))
    second = config_of(train("tiny.yaml", dataset=iter(rows), eval_dataset=rows[:3]))
    assert first["data"]["source"] == "file" and first["data"]["path"] == second["data"]["path"]
    assert [json.loads(line) for line in Path(first["data"]["path"]).read_text().splitlines()] == rows
    assert len(Path(second["data"]["eval_path"]).read_text().splitlines()) == 3


def test_a_data_set_of_the_library_gives_its_rows(workspace: Path) -> None:
    import datasets

    rows = [{"prompt": "1?", "answer": "1", "tags": ["a"]}, {"prompt": "2?", "answer": "2", "tags": []}] * 10
    found = config_of(train("tiny.yaml", dataset=datasets.Dataset.from_list(rows)))["data"]["path"]
    assert [json.loads(line) for line in Path(found).read_text().splitlines()] == rows


def test_rewards_replace_those_of_the_config(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(workspace))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # another test's
    import my_rewards  # pyright: ignore[reportMissingImports]  # the workspace's

    def cell(completions: list[str], **columns: Any) -> list[float]:
        return [0.0 for _ in completions]

    weight = "reward.functions.cell.weight=0.5"
    functions = config_of(train("tiny.yaml", [weight], rewards=["numeric_answer", my_rewards.odd, cell]))["reward"][
        "functions"
    ]
    assert {name: one["function"] for name, one in functions.items()} == {
        "numeric_answer": "numeric_answer",
        "odd": "my_rewards.odd",
        "cell": "sapo_rl.rewards.session.call",
    }
    assert functions["cell"]["weight"] == 0.5 and functions["cell"]["args"] == {"session_function": "cell"}
    named = config_of(train("tiny.yaml", rewards={"mine": "my_rewards.odd"}))["reward"]["functions"]
    assert list(named) == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"takes either config or resume"),
        ({"config": "tiny.yaml", "resume": "runs/tiny"}, r"takes either config or resume"),
        ({"config": 3}, r"config: is a int, must be"),
        ({"config": "tinny"}, r"config: no recipe 'tinny'"),
        ({"config": "tiny.yaml", "overrides": ["trainer.step=3"]}, r"trainer.step \(command line\): no such key"),
        ({"config": "tiny.yaml", "overrides": ["trainer.steps=-3"]}, r"trainer.steps \(command line\): .*at least"),
        ({"config": "tiny.yaml", "overrides": ["seed=1,2"]}, r"'seed=1,2' \(command line\): add -m"),
        ({"config": "tiny.yaml", "overrides": ["dry_run=true"]}, r"dry_run \(command line\): is for the command line"),
        ({"config": {"trainer": {"stepps": 3}}}, r"trainer.stepps \(config\): no such key"),
        ({"config": "tiny.yaml", "dataset": [{"prompt": "a"}, 3]}, r"dataset: row 1 is a int"),
        (
            {"config": "tiny.yaml", "dataset": [{"prompt": {1}}]},
            r"dataset: row 0, column 'prompt' is nothing that JSON",
        ),
        ({"config": "tiny.yaml", "eval_dataset": []}, r"eval_dataset needs dataset"),
        ({"config": "tiny.yaml", "rewards": [len, len]}, r"rewards: two are called 'len'"),
        ({"config": "tiny.yaml", "rewards": [3]}, r"rewards: 'int' is a int, must be a function"),
        (
            {"config": "tiny.yaml", "rewards": ["numerick"]},
            r"reward.functions.numerick.function \(command line\): unknown",
        ),
        ({"resume": "nowhere"}, r"resume: 'nowhere' is no run folder"),
    ],
)
def test_mistakes_are_told_as_the_command_line_does(workspace: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(**arguments)
    assert not (workspace / "runs/tiny").exists()


def test_a_run_is_a_table_of_its_numbers_and_words(tmp_path: Path) -> None:
    records = [
        {"step": 0, "time": 1.0, "eval/reward": 0.25},
        {"step": 1, "time": 2.0, "reward/mean": 0.5, "time/step": 1.0},
        {"step": 1, "time": 2.0, "warning": "hot"},
        {"step": 1, "time": 3.0, "eval/reward": 0.75},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (tmp_path / "completions").mkdir()
    words = pa.table({"completion": ["a", "b"], "reward": [0.0, 1.0]})
    pq.write_table(words, tmp_path / "completions/step_00001.parquet")
    pq.write_table(words.slice(1), tmp_path / "completions/eval_00000.parquet")
    run = Run(tmp_path)
    assert list(run.metrics.index) == [0, 1]
    assert run.metrics["eval/reward"].to_list() == [0.25, 0.75]
    assert run.metrics.loc[1, "reward/mean"] == 0.5 and "warning" not in run.metrics
    assert run.completions(1)["reward"].to_list() == [0.0, 1.0]
    with pytest.raises(UserError, match="no completions of step 2"):
        run.completions(2)
    assert run.eval_completions(0)["completion"].to_list() == ["b"]
    with pytest.raises(UserError, match=r"no tokens of step 1 \(logging.tokens\)"):
        run.tokens(1)
    write_tokens(tmp_path, 1, [(0, TokenValues(Place(0, 0, 0), [Row([1], [5])], 1.0, 0.5, {}))], lambda ids: ["a"])
    assert run.tokens(1)["texts"].map(list).to_list() == [["a"]]
    with pytest.raises(UserError, match="no completions of an evaluation after step 1"):
        run.eval_completions(1)
    with pytest.raises(UserError, match="no file"):
        _ = Run(tmp_path / "nowhere").metrics
