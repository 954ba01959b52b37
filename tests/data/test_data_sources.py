"""Rows from every source, and the split into training and held-out rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sapo_rl.config import DataConfig
from sapo_rl.data import check_source, load_rows
from sapo_rl.errors import UserError

ROWS = [{"prompt": f"Question {number}?", "answer": str(number)} for number in range(20)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "train.jsonl", ROWS)


def by_prompt(rows: dict[int, dict[str, Any]]) -> set[str]:
    return {row["prompt"] for row in rows.values()}


def numbered(rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return dict(enumerate(rows))


@pytest.mark.parametrize(
    ("source", "path"), [("arithmetic", None), ("reasoning_gym", "chain_sum"), ("reasoning_gym", "leg_counting")]
)
def test_generators_hold_out_other_questions(source: str, path: str | None) -> None:
    cfg = DataConfig(source=source, path=path, size=90)
    check_source(cfg)
    train, held_out = load_rows(cfg, 30)
    assert (len(train), len(held_out)) == (90, 30)
    assert not by_prompt(train) & by_prompt(held_out)
    assert load_rows(cfg, 30) == (train, held_out)
    assert by_prompt(load_rows(replace(cfg, split_seed=2), 30)[1]) != by_prompt(held_out)


def test_a_small_space_gives_fewer_training_rows_and_all_held_out_rows() -> None:
    cfg = DataConfig(source="arithmetic", size=1000, args={"digits": 1, "operations": ["+"]})
    train, held_out = load_rows(cfg, 64)
    assert (len(train), len(held_out)) == (36, 64)
    with pytest.raises(UserError, match=r"only 100 different questions, eval\.prompts=100"):
        load_rows(cfg, 100)


def test_jsonl_and_parquet_rows_are_read_in_order(tmp_path: Path, jsonl: str) -> None:
    assert load_rows(DataConfig(source="file", path=jsonl), 0) == (numbered(ROWS), {})
    parquet = write_parquet(tmp_path / "train.parquet", ROWS)
    assert load_rows(DataConfig(source="file", path=parquet), 0) == (numbered(ROWS), {})


def test_blank_lines_and_unicode_line_separators_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('\ufeff{"prompt": "a\u2028b"}\n\n{"prompt": "c"}\r\n', encoding="utf-8")
    rows, _ = load_rows(DataConfig(source="file", path=str(path)), 0)
    assert rows == numbered([{"prompt": "a\u2028b"}, {"prompt": "c"}])


def test_rows_are_held_out_by_split_seed_and_their_copies_leave_the_training_rows(tmp_path: Path) -> None:
    doubled = write_jsonl(tmp_path / "doubled.jsonl", ROWS + ROWS)
    cfg = DataConfig(source="file", path=doubled)
    train, held_out = load_rows(cfg, 5)
    assert len(held_out) == 5
    assert not by_prompt(train) & by_prompt(held_out)
    assert by_prompt(train) | by_prompt(held_out) == by_prompt(numbered(ROWS))
    assert load_rows(cfg, 5) == (train, held_out)
    assert load_rows(replace(cfg, split_seed=4), 5)[1] != held_out


def test_rows_keep_their_number_where_others_are_held_out(jsonl: str) -> None:
    train, held_out = load_rows(DataConfig(source="file", path=jsonl), 5)
    assert train | held_out == numbered(ROWS)
    assert len(train) == 15 and len(held_out) == 5


def test_an_evaluation_file_is_used_instead(tmp_path: Path, jsonl: str) -> None:
    other = [{"prompt": f"Other {number}?", "answer": "1"} for number in range(8)]
    cfg = DataConfig(source="file", path=jsonl, eval_path=write_parquet(tmp_path / "test.parquet", other))
    check_source(cfg)
    train, held_out = load_rows(cfg, 5)
    assert train == numbered(ROWS)
    assert len(held_out) == 5 and all(row == other[number] for number, row in held_out.items())
    assert load_rows(cfg, 50)[1] == numbered(other)


def test_hub_datasets_by_folder_with_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    write_jsonl(folder / "test.jsonl", ROWS[:4])
    cfg = DataConfig(source="huggingface", path=str(folder), eval_split="test")
    assert load_rows(cfg, 9) == (numbered(ROWS), numbered(ROWS[:4]))
    with pytest.raises(UserError, match=r"cannot load the dataset.*split 'dev'"):
        load_rows(DataConfig(source="huggingface", path=str(folder), split="dev"), 0)
    with pytest.raises(UserError, match=r"cannot load the dataset '.*absent'"):
        load_rows(DataConfig(source="huggingface", path=str(tmp_path / "absent")), 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', r"rows\.jsonl:2: no valid JSON"),
        ('{"prompt": "a"}\n\n["b"]\n', r"rows\.jsonl:3: must be a JSON object, is a list"),
        ("\n", "has no rows"),
        ('{"a": 1}\n{"a": ' + "[" * 5000 + "]" * 5000 + "}", r"rows\.jsonl:2: is nested deeper than 50 levels"),
        ('{"a": ' + "9" * 5000 + "}", r"rows\.jsonl:1: a whole number of more than 4,300 digits"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_rows(DataConfig(source="file", path=str(path)), 0)


def test_files_that_are_not_what_they_end_in(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_text("no parquet")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        load_rows(DataConfig(source="file", path=str(tmp_path / "rows.parquet")), 0)
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_rows(DataConfig(source="file", path=str(tmp_path / "rows.jsonl")), 0)


def test_a_missing_prompt_column_is_named_before_rows_are_held_out(jsonl: str) -> None:
    with pytest.raises(UserError, match=r"data\.prompt_column: the data has no column 'query'; .*prompt"):
        load_rows(DataConfig(source="file", path=jsonl, prompt_column="query"), 4)


def test_too_few_rows_to_hold_out(jsonl: str) -> None:
    for count in (20, 64):
        with pytest.raises(
            UserError, match=rf"20 of 20 rows are held out \(eval\.prompts={count}\), which leaves none"
        ):
            load_rows(DataConfig(source="file", path=jsonl), count)


def test_rows_that_are_all_alike_cannot_be_held_out(tmp_path: Path) -> None:
    alike = write_jsonl(tmp_path / "alike.jsonl", ROWS[:1] * 8)
    told = r"4 of 8 rows are held out \(eval\.prompts=4\), and the other 4 repeat a held-out prompt, which leaves"
    with pytest.raises(UserError, match=told):
        load_rows(DataConfig(source="file", path=alike), 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "file"}, r"data\.path: is missing"),
        ({"source": "file", "path": "absent.jsonl"}, r"data\.path: there is no file 'absent\.jsonl'"),
        ({"source": "file", "path": "rows.csv"}, r"unknown ending; valid: \.jsonl, \.parquet"),
        ({"source": "huggingface"}, r"data\.path: is missing"),
        ({"source": "reasoning_gym"}, r"data\.path: is missing"),
        ({"source": "reasoning_gym", "path": "chain_summ"}, "did you mean 'chain_sum'"),
        ({"source": "arithmetic", "args": {"digits": -1}}, r"data\.args\.digits"),
        ({"template": "Hello"}, r"data\.template: 'Hello' holds no column"),
        ({"template": "{prompt} \\boxed{answer}"}, "would show the model the answer"),
        ({"template": "{prompt} {key}", "answer_column": "key"}, "would show the model the answer"),
        ({"template": "{prompt} {the key}", "answer_column": "the key"}, "would show the model the answer"),
        ({"response_prefix": "{answer}"}, r"data\.response_prefix: .*would show the model the answer"),
        ({"system_prompt": "Hi", "chat_template": False}, r"needs data\.chat_template"),
        ({"response_prefix": "A", "chat_template": False}, r"data\.response_prefix: needs data\.chat_template"),
    ],
)
def test_mistakes_are_refused_early(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_source(DataConfig(**fields))


def test_an_absent_evaluation_file_is_refused_early(jsonl: str) -> None:
    with pytest.raises(UserError, match=r"data\.eval_path: there is no file"):
        check_source(DataConfig(source="file", path=jsonl, eval_path="absent.jsonl"))


def test_parquet_that_has_no_equal_in_python_is_named_by_column_and_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    cfg = DataConfig(source="file", path=str(path))
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), path)
    with pytest.raises(UserError, match=r"rows\.parquet: has two columns called 'prompt'; rename one") as raised:
        load_rows(cfg, 0)
    assert len(str(raised.value).splitlines()) == 1
    waits = pa.array([0, 2**62], type=pa.duration("ms"))
    pq.write_table(pa.table({"prompt": ["a", "b"], "waits": waits}), path)
    with pytest.raises(UserError, match=r"rows\.parquet: column 'waits', row 1: "):
        load_rows(cfg, 0)


def test_datasets_that_do_not_load_are_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    files = {"script": "script.py", "json": "train.json", "csv": "train.csv"}
    texts = {"script": "raise SystemExit", "json": '{"a": [1}', "csv": 'a,b\n1,"2\n3,4,5,6\n'}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / files[name]).write_text(text)
        with pytest.raises(UserError, match=r"data\.path: cannot load the dataset") as raised:
            load_rows(DataConfig(source="huggingface", path=str(tmp_path / name)), 0)
        assert len(str(raised.value).splitlines()) == 1
