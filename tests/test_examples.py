"""The folders of docs/examples, as a user has them: a copy each, in which the command line starts up to a dry run."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from inside import sapo_train

pytestmark = pytest.mark.usefixtures("forked_workers")
EXAMPLES = Path(__file__).resolve().parents[1] / "docs/examples"
SHORT = ("data.max_prompt_tokens=200", "rollout.max_completion_tokens=64")
"""The tiny model reads 512 characters."""
GSM8K = [
    {"question": f"Tom has {a} apples and buys {b}. How many are there?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"}
    for a in range(20)
    for b in range(20)
]
Enter = Callable[[str], Path]


@pytest.fixture
def enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Enter:
    """Copies an example and makes it the current folder; returns that."""

    def copy(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(EXAMPLES / name, folder)
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))
        return folder

    return copy


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the example, which is forgotten afterwards."""
    monkeypatch.delitem(sys.modules, name, raising=False)
    found = importlib.import_module(name)
    del sys.modules[name]
    return found


def tried(recipe: str, *overrides: str) -> list[str]:
    """The lines that a dry run prints, without their frames."""
    code, shown, told = sapo_train(f"config={recipe}", *overrides, "dry_run=true")
    assert code == 0, told
    return [" ".join(line.replace("│", " ").split()) for line in shown.splitlines()]


def test_gsm8k_words_the_columns_of_its_dataset_and_scores_the_last_line(
    enter: Enter, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (enter("gsm8k") / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in GSM8K))
    local = (
        "data=file",
        "data.path=rows.jsonl",
        "data.subset=null",
        "data.eval_split=null",
        "eval.prompts=256",
        f"model.path={tiny_model}",
    )
    shown = tried("gsm8k.yaml", *local, *SHORT)
    assert {"columns question, answer", "rows to train on 144", "held-out rows 256"} <= set(shown)
    rewards = module("my_rewards", monkeypatch)
    replies = ["3 + 4 = 7\n#### 7", "#### 1,234.5\n", "#### 7 apples", "so 7", ""]
    assert rewards.last_line(completions=replies) == [1, 1, 0, 0, 0]


def test_the_recipe_math_reads_the_columns_of_its_dataset_and_measures_on_math500(
    tmp_path: Path, tiny_model: Path
) -> None:
    pytest.importorskip("math_verify")
    rows = [{"problem": f"What is ${n}^2$?", "answer": str(n * n), "level": 1} for n in range(80)]
    for name, part in (("train", rows[:64]), ("test", rows[64:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
    test = "eval.sets.math500.data"
    there = (f"{test}.source=file", f"{test}.path={tmp_path}/test.jsonl", f"{test}.max_prompt_tokens=200")
    local = ("data=file", f"data.path={tmp_path}/train.jsonl", *there)
    shown = tried("math", *local, f"model.path={tiny_model}", *SHORT)
    assert {"rows to train on 64", "held-out rows 0", "eval set math500 16 prompts, greedily"} <= set(shown), shown


def test_the_tool_of_tool_agent_answers_its_rows(
    enter: Enter, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("tool_agent")
    rows, tools = module("my_rows", monkeypatch).spans(count=50), module("my_tools", monkeypatch)
    for row in rows:
        first, second = row["prompt"].removeprefix("How many days are there from ").removesuffix("?").split(" to ")
        assert str(tools.days_between(first, second)) == row["answer"]
    assert rows == module("my_rows", monkeypatch).spans(count=50)
    shown = tried("agent.yaml", f"model.path={tiny_model}", *SHORT, "environment.max_tokens=200")
    assert {"rows to train on 3,968", "held-out rows 128", "longest sequence 400 tokens"} <= set(shown)


def test_judge_asks_about_columns_that_the_rows_have(enter: Enter, tiny_model: Path) -> None:
    enter("judge")
    shown = tried("explain.yaml", f"model.path={tiny_model}", *SHORT)
    assert {"columns prompt, must", "rows to train on 12", "held-out rows 4"} <= set(shown)


def test_own_loss_weighs_tokens_as_it_says(enter: Enter, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from sapo_rl.losses import LossInputs, build_loss

    enter("own_loss")
    logps = torch.tensor([-0.5, -1.0, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-0.5, -2.0, -2.0, -1.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -2.0, -2.0], dtype=torch.float64)
    inputs = LossInputs(
        logps=logps,
        old_logps=old,
        advantages=advantages,
        sequence_ids=torch.tensor([0, 0, 1, 1]),
        num_sequences=2,
        token_weights=torch.full((4,), 0.25, dtype=torch.float64),
    )
    outputs = build_loss(module("my_losses", monkeypatch).Tapered)(inputs)
    outputs.loss.backward()
    weights = torch.tensor([1.0, 1.0, 1.0, torch.e**-1], dtype=torch.float64)  # the ratio of the third, e, is cut at 1
    assert logps.grad is not None and logps.grad.tolist() == pytest.approx((-0.25 * weights * advantages).tolist())
    shown = tried("tapered.yaml", "data.max_prompt_tokens=64")
    assert "completions in all 1920" in shown
    code, _, told = sapo_train("config=tapered.yaml", "loss.clip_hgih=2", "dry_run=true")
    assert code == 2 and "loss.clip_hgih" in told and "did you mean 'clip_high'" in told


def test_the_recipe_of_wordle_asks_for_words_and_holds_some_out(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"{first}{second}ade" for first in "bcdfgjlmnprstw" for second in "aeiou"]
    (tmp_path / "words.txt").write_text("\n".join(words))
    own = (f"model.path={tiny_model}", *SHORT, "data.max_prompt_tokens=300", "environment.max_tokens=200")
    code, _, told = sapo_train("config=wordle", *own, "dry_run=true")
    assert code == 2 and told.startswith("sapo-train: data.args.words (") and "must be given" in told
    shown = tried("wordle", *own, "data.args.words=words.txt")
    assert {"rows to train on 4,096", "held-out rows 128", "columns prompt, answer"} <= set(shown)
