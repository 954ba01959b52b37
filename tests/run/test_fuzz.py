"""Random recipes, arguments and data files: whatever they hold, the answer is two lines that name file, key or row."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from inside import sapo_train
from omegaconf import OmegaConf

from sapo_rl.config import Config, DataConfig
from sapo_rl.data import load_rows
from sapo_rl.data.prompts import content_of, with_all_columns
from sapo_rl.errors import UserError

SCHEMA: Any = OmegaConf.to_container(OmegaConf.structured(Config))
KEYS = [f"{s}.{key}" for s, keys in SCHEMA.items() if isinstance(keys, dict) for key in keys] + list(SCHEMA)
VALUES = [
    *(
        "null",
        "''",
        "[]",
        "{}",
        "[1]",
        "{a: 1}",
        ".inf",
        ".nan",
        "1e309",
        "-1",
        "0",
        "9" * 30,
        "9" * 400,
        "yes",
        "grpo",
    ),
    *("${nope}", "${trainer.steps}", "${oc.env:NOPE}", "${oc.decode:'[1'}", "${", '"\\ud83d"', '"\\0"', '"\\x1b[2J"'),
    *("x" * 3000, "../..", "/dev/null", "!!int x", "!!set {a}", "!!python/name:os.system", "2020-01-01", "&a [*a]"),
    *("*nope", "- 1", "a: b: c", "'", "%", "@x", "\t", "???", "{<<: {a: 1}}", "[" * 60 + "]" * 60, "os.path", "a..b"),
]
DEFAULTS = [
    "[mine]",
    "quickstart",
    "[{/loss: [sapo, grpo]}]",
    "[null]",
    "[/schema]",
    "[{override /model: '${x}'}]",
    "['']",
]
CELLS = [
    None,
    True,
    -1,
    10**30,
    1.5,
    float("nan"),
    "",
    " ",
    "text",
    "x" * 5000,
    "\ud83d",
    "\0",
    "\u2028",
    [],
    {},
    [[1]],
]


def recipe(rng: random.Random) -> bytes:
    lines = [f"defaults: {rng.choice(DEFAULTS)}"] if rng.random() < 0.2 else []
    for _ in range(rng.randrange(1, 3)):
        section, _, key = rng.choice(KEYS).partition(".")
        value = rng.choice(VALUES)
        lines.append(f"{section}: {{{key}: {value}}}" if key and rng.random() < 0.8 else f"{section}: {value}")
    text = bytearray("\n".join(lines).encode())
    if rng.random() < 0.2:
        text[rng.randrange(len(text))] = rng.randrange(256)
    return bytes(text)


def arguments(rng: random.Random, folder: Path) -> list[str]:
    if rng.random() < 0.6:
        (folder / "mine.yaml").write_bytes(recipe(rng))
        return ["config=mine.yaml", "data=arithmetic", "reward=numeric"]
    key = rng.choice([*KEYS, "reward.functions.b", "hydra.run.dir", "config", "", "x" * 300])
    return ["config=quickstart", f"{rng.choice(['', '', '+', '++', '~'])}{key}={rng.choice(VALUES)}"]


def test_random_recipes_and_arguments_end_in_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sapo_rl.run.cli.run", lambda *_: None)
    rng = random.Random(0)
    for number in range(30):
        given = arguments(rng, tmp_path)
        code, _, told = sapo_train(*given, "model.path=nowhere")  # refused at the latest for its model
        assert code == 2 and 1 <= len(told.splitlines()) <= 2 and len(told) < 1600, (number, given, told)


def line(rng: random.Random) -> bytes:
    row = {name: rng.choice(CELLS) for name in ("prompt", "answer", "level") if rng.random() < 0.9}
    if rng.random() < 0.7:
        row["prompt"] = rng.choice(["Q?", [{"role": "user", "content": "Q?"}], [{"role": "user"}], [{"content": 3}]])
    text = bytearray(json.dumps(row, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass"))
    kind = rng.random()
    if kind < 0.15:
        text[rng.randrange(len(text))] = rng.randrange(256)
    elif kind < 0.2:
        depth = rng.choice([40, 60, 5000])
        text = bytearray(b'{"prompt": "a", "answer": ' + b"[" * depth + b"]" * depth + b"}")
    elif kind < 0.25:
        text = bytearray(b'{"prompt": "a", "answer": ' + b"9" * rng.choice([100, 5000]) + b"}")
    return bytes(text)


def test_random_data_is_read_whole_or_refused_by_file_row_or_column(tmp_path: Path) -> None:
    rng, path, read = random.Random(0), tmp_path / "rows.jsonl", 0
    for number in range(200):
        lines = [line(rng) for _ in range(rng.randrange(1, 4))]
        path.write_bytes(b"\n".join(lines))
        cfg = DataConfig(source="file", path=str(path), answer_column=rng.choice(["answer", None]))
        try:
            rows = with_all_columns(load_rows(cfg, 0)[0], cfg)
            for index, row in rows.items():
                content_of(row, index, cfg).__str__().encode()
            assert len(rows) == len(lines), (number, lines)
            read += 1
        except UserError as error:
            told = str(error)
            assert len(told.splitlines()) <= 2 and len(told) < 1500 and told.encode(), (number, told)
            assert any(word in told for word in ("rows.jsonl", "row ", "data.")), (number, told)
    assert 30 < read < 170
