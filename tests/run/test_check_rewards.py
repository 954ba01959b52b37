"""`check=rewards`: what reward functions say of given completions, and rows that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inside import sapo_train
from tiny import make_stand_in, make_tokenizer, make_workspace

REWARDS = """
def rank(completions, **columns):
    order = sorted(completions, key=len)
    return [float(order.index(text)) for text in completions]

def words(completions, completion_ids, **columns):
    return [{"score": len(text.split()), "tokens": len(ids)} for text, ids in zip(completions, completion_ids)]

def picky(completions, answer, **columns):
    if "no" in completions:
        raise ValueError("not that one")
    return [None if text == known else 0.5 for text, known in zip(completions, answer)]

def seen(completions, environments, **columns):
    return [float(one.reward) for one in environments]
"""
FUNCTIONS = {
    "right": {"function": "numeric_answer"},
    "rank": {"function": "my_rewards.rank", "scope": "group"},
    "words": {"function": "my_rewards.words", "weight": 0},
    "picky": {"function": "my_rewards.picky", "on_error": "zero"},
}
ONLY_RIGHT = [f"~reward.functions.{name}" for name in ("picky", "rank", "words")]
pytestmark = pytest.mark.usefixtures("forked_workers")
ROWS = [
    {"prompt": "What is 1 + 1?", "answer": "2", "completion": "It is 2"},
    {"prompt": "What is 1 + 1?", "answer": "2", "completion": "3"},
    {"prompt": "What is 2 + 2?", "answer": "4", "completion": "4"},
    {"prompt": "What is 2 + 2?", "answer": "4", "completion": "no"},
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = make_stand_in(tmp_path / "model")
    make_tokenizer().save_pretrained(model)
    make_workspace(tmp_path, model, REWARDS, reward={"functions": FUNCTIONS})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def check(*arguments: str) -> tuple[int, list[list[str]], str]:
    """Return the exit code, the cells of the table, and what was told."""
    code, shown, told = sapo_train("config=tiny.yaml", "check=rewards", *arguments)
    rows = [line.strip("│┃").split("┃" if "┃" in line else "│") for line in shown.splitlines() if line[:1] in "│┃"]
    return code, [[cell.strip() for cell in row] for row in rows], told + shown


def test_each_function_says_what_it_gives_and_where_it_fails(here: Path) -> None:
    write(here / "given.jsonl", ROWS)
    code, table, told = check("data.check.completions=given.jsonl")
    assert code == 0, told
    assert table == [
        ["prompt", "completion", "picky", "rank", "right", "words", "words/tokens"],
        ["What is 1 + 1?", "It is 2", "0.5", "1", "1", "3", "7"],
        ["What is 1 + 1?", "3", "0.5", "0", "0", "1", "1"],
        ["What is 2 + 2?", "4", "-", "0", "1", "1", "1"],
        ["What is 2 + 2?", "no", "0", "1", "0", "1", "2"],
        ["", "mean", "0.3333", "0.5", "0.5", "1.5", "2.75"],
    ]
    assert "not that one" in told and "my_rewards.py" in told and "(reward picky: 1)" in told
    assert not (here / "runs").exists() and not (here / "checks").exists()


def test_lengths_that_the_model_could_not_take_are_no_matter_as_it_does_not_run(here: Path) -> None:
    make_stand_in(here / "model", max_position_embeddings=16)
    write(here / "given.jsonl", ROWS)
    code, table, told = check("data.check.completions=given.jsonl", *ONLY_RIGHT)
    assert code == 0 and table[-1] == ["", "mean", "0.5"], told
    code, _, told = sapo_train("config=tiny.yaml", "dry_run=true")
    assert code == 2 and "the model's limit is 16" in told


def test_rows_with_a_prompt_index_answer_the_rows_of_the_data(here: Path) -> None:
    write(here / "data.jsonl", [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(5)])
    said = json.dumps([{"role": "assistant", "content": "6"}])
    written = {"prompt_index": [3, 3], "completion": ["?", "7"], "messages": [said, None], "reward": [0.0, 0.0]}
    pq.write_table(pa.table(written), here / "step.parquet")
    arguments = ("data.source=file", "data.path=data.jsonl", "eval.prompts=0", *ONLY_RIGHT)
    code, table, told = check("data.check.completions=step.parquet", *arguments)
    assert code == 0, told
    assert table[1:] == [["What is 3 + 3?", "6", "1"], ["What is 3 + 3?", "7", "0"], ["", "mean", "0.5"]]
    for row, words in (
        ({"prompt_index": 5, "completion": "10"}, "has prompt_index 5, which is no row that the data has to train on"),
        (
            {"prompt_index": 1, "completion": "2", "greedy": True},
            "answers a held-out prompt; take completions of a step",
        ),
    ):
        write(here / "given.jsonl", [row])
        code, _, told = check("data.check.completions=given.jsonl", *arguments)
        assert code == 2 and f"row 0 {words}" in told


@pytest.mark.parametrize(
    ("rows", "arguments", "words"),
    [
        (ROWS, [], ["data.check.completions", "is missing", ".jsonl", "columns of the data and 'completion'"]),
        (ROWS, ["data.check.completions=gone.jsonl"], ["data.check.completions (command line)", "gone.jsonl"]),
        ([{"prompt": "a", "answer": "b"}], ["data.check.completions=given.jsonl"], ["row 0", "no column 'completion'"]),
        ([], ["data.check.completions=given.jsonl"], ["data.check.completions", "has no rows"]),
        (
            [{"completion": "x"}],
            ["data.check.completions=given.jsonl"],
            ["'given.jsonl': data.prompt_column", "no column 'prompt'", "or 'prompt_index', the number of a row of it"],
        ),
        (ROWS, ["data.check.completions=given.jsonl", "data.pass_rate.reward=rihgt"], ["did you mean 'right'?"]),
    ],
)
def test_what_cannot_be_scored_is_told(here: Path, rows: Any, arguments: list[str], words: list[str]) -> None:
    write(here / "given.jsonl", rows)
    code, _, told = check(*arguments)
    assert code == 2 and "Traceback" not in told
    assert all(word in told for word in words), told


def test_episodes_are_given_as_messages(here: Path) -> None:
    messages = [{"role": "assistant", "content": "5?"}, {"role": "user", "content": "no, 3"}]
    last = {"role": "assistant", "content": "2"}
    rows = [{"prompt": "Half of 4?", "answer": "2", "completion": one} for one in ([*messages, last], messages)]
    write(here / "given.jsonl", rows)
    code, table, told = check("data.check.completions=given.jsonl", *ONLY_RIGHT)
    assert code == 0, told
    assert [row[2] for row in table if row[0] == "Half of 4?"] == ["1", "0"]


def test_what_needs_no_run_asks_for_nothing_that_a_run_would(here: Path) -> None:
    code, _, told = check("data.check.completions=x.jsonl", "check=data", "rollout.servers=[127.0.0.1:1]")
    assert code == 2 and "rollout.servers (command line): check=data has engines of its own" in told


def test_a_function_that_asks_for_environments_is_told_and_can_be_left_out(here: Path) -> None:
    write(here / "given.jsonl", ROWS)
    given = ("data.check.completions=given.jsonl", "+reward.functions.seen={function: my_rewards.seen}", *ONLY_RIGHT)
    code, _, told = check(*given)
    assert code == 2
    assert "reward function 'seen' (my_rewards.seen) asks for 'environments', and given completions have none" in told
    assert "leave it out, '~reward.functions.seen'" in told and len(told.splitlines()) == 1
