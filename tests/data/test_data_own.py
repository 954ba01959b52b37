"""Rows from a function of the user's own, named by its dotted path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sapo_rl.config import DataConfig
from sapo_rl.data import load_rows, own
from sapo_rl.errors import UserError

MODULE = """
def rows(count: int, letter: str = "a"):
    for number in range(count):
        yield {"prompt": letter + str(number), "answer": number}

def by_split(split, count: int = 3):
    return [{"prompt": f"{split} {number}"} for number in range(count)]

def fails(count: int = 1):
    raise ValueError("no more")

def words():
    return ["a", "b"]

def nothing():
    return []

number = 3
in_c = iter
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_rows.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_rows", None)


def test_its_rows_are_numbered_and_some_held_out() -> None:
    train, held_out = load_rows(DataConfig(source="own_rows.rows", args={"count": 10, "letter": "b"}), 4)
    assert len(train) == 6 and len(held_out) == 4
    assert {**train, **held_out} == {number: {"prompt": f"b{number}", "answer": number} for number in range(10)}


def test_one_that_knows_splits_is_told_which() -> None:
    config = DataConfig(source="own_rows.by_split", split="first", eval_split="last", answer_column=None)
    train, held_out = load_rows(config, 8)
    assert [row["prompt"] for row in train.values()] == ["first 0", "first 1", "first 2"]
    assert [row["prompt"] for row in held_out.values()] == ["last 0", "last 1", "last 2"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("rows", {}, r"data.args: 'count' is missing"),
        ("rows", {"args": {"count": "3"}}, r"data.args.count: '3' is a str, must be int"),
        ("rows", {"args": {"count": 3, "leter": "a"}}, r"data.args.leter: unknown argument; did you mean 'letter'"),
        ("rows", {"args": {"count": 3}, "eval_split": "test"}, r"data.eval_split: .* has no parameter 'split'"),
        ("number", {}, r"data.source: 'own_rows.number' is a int, not a function"),
        ("row", {}, r"data source 'own_rows.row': 'own_rows' has no 'row'; did you mean 'rows'"),
    ],
)
def test_mistakes_are_found_before_it_is_called(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        own.find(DataConfig(source=f"own_rows.{name}", **settings))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", r"data.source: 'own_rows.fails' failed: ValueError: no more \(.*own_rows.py:10\)"),
        ("words", r"data.source: row 0 of 'own_rows.words' is a str, must be a mapping"),
        ("nothing", r"data.source: 'own_rows.nothing', split 'train', has no rows"),
        ("in_c", r"data.source: 'own_rows.in_c' failed: TypeError: iter expected at least 1 argument"),
    ],
)
def test_what_it_returns_is_looked_at(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_rows(DataConfig(source=f"own_rows.{name}"), 1)
