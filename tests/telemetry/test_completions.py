"""Completions on disk."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from sapo_rl.telemetry.sinks.completions import prompt_text, write_completions


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
        "rewards/match": None,
    }
    assert [path.name for path in path.parent.iterdir()] == ["step_00012.parquet"]


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
