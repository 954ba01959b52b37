"""Completions on disk."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pyarrow.parquet as pq
from samples import one_row

from sapo_rl.telemetry.sinks.completions import eval_rows, prompt_text, rows, write_completions, write_eval_completions
from sapo_rl.types import Group, Prompt


def test_every_sample_is_a_row(tmp_path: Path, make_group) -> None:
    samples = [*make_group(4, [1.0, None], step=12), *make_group(9, [0.0, 0.5], step=12)]
    path = write_completions(tmp_path, 12, samples)
    assert path == tmp_path / "completions" / "step_00012.parquet"
    rows = pq.read_table(path).to_pylist()
    assert [row["prompt_index"] for row in rows] == [4, 4, 9, 9]
    assert rows[1] == {
        "step": 12,
        "prompt_index": 4,
        "prompt": "What is 4 - 8? [bold]",
        "completion": "reply 1\x1b[31m",
        "reward": None,
        "advantage": 0.5,
        "stop": "length",
        "tokens": 2,
        "length": 2,
        "turns": 1,
        "rows": 1,
        "weight_version": 11,
        "last_weight_version": 11,
        "columns": '{"answer": "-4"}',
        "prompt_messages": None,
        "messages": None,
        "info": None,
        "conversations": None,
        "rewards/match": None,
    }
    assert [path.name for path in path.parent.iterdir()] == ["step_00012.parquet"]


def test_an_episode_keeps_its_messages_and_the_data_its_columns(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "Go."}]
    opening = [*asked, {"role": "user", "content": "Is it a \ud800 </script>?"}]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
    said = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "é"}]
    sample = one_row([7], messages=said, opening=opening, info={"told": {"seen": 1}})
    columns = {"answer": 3, "day": datetime.date(2026, 1, 2)}
    group = Group(Prompt(0, [1], asked, columns), [sample, one_row([8])])
    kept, plain = pq.read_table(write_completions(tmp_path, 1, rows(1, group))).to_pylist()
    assert json.loads(kept["columns"]) == {"answer": 3, "day": "2026-01-02"}
    assert [json.loads(kept[name]) for name in ("prompt_messages", "messages", "info")] == [opening, said, sample.info]
    assert (
        json.loads(plain["prompt_messages"]) == asked and plain["messages"] is None and plain["prompt"] == "user: Go."
    )


def test_an_evaluation_has_a_file_with_the_reward_that_its_accuracy_is_of(tmp_path: Path) -> None:
    sample = one_row([7], rewards={"correct": 1.0, "brief": 0.25})
    path = write_eval_completions(
        tmp_path, 6, eval_rows(6, [Group(Prompt(3, [1], "Go.", {}), [sample])], "hard", "brief", True)
    )
    assert path == tmp_path / "completions" / "eval_00006.parquet"
    (row,) = pq.read_table(path).to_pylist()
    told = {"step": 6, "prompt_index": 3, "set": "hard", "greedy": True, "reward": 0.25, "advantage": None}
    assert row.items() >= (told | {"rewards/correct": 1.0}).items()


def test_types_do_not_depend_on_the_values(tmp_path: Path, make_group) -> None:
    empty = pq.read_schema(write_completions(tmp_path, 1, make_group(0, [None, None])))
    full = pq.read_schema(write_completions(tmp_path, 2, make_group(0, [1.0, 0.0])))
    assert empty.equals(full)


def test_a_step_written_again_is_replaced(tmp_path: Path, make_group) -> None:
    write_completions(tmp_path, 1, make_group(0, [1.0, 0.0]))
    path = write_completions(tmp_path, 1, make_group(5, [1.0, 0.0, 1.0]))
    assert pq.read_table(path)["prompt_index"].to_pylist() == [5, 5, 5]


def test_messages_are_written_out() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert prompt_text(messages) == "system: Be brief.\n\nuser: Hi"
    assert prompt_text("plain") == "plain"
