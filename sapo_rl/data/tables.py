"""Rows of local files (JSONL, Parquet) and of Hugging Face datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sapo_rl.errors import UserError

SUFFIXES = (".jsonl", ".parquet")


def check_file(key: str, path: str | None) -> Path:
    """Return the path that the config has under `key`, known to exist and to be of a known kind.

    Raises:
        UserError: otherwise.
    """
    if not path:
        raise UserError(f"{key}: is missing; the path of a file that ends in {' or '.join(SUFFIXES)}")
    file = Path(path).expanduser()
    if file.suffix not in SUFFIXES:
        raise UserError(f"{key}: '{path}' has an unknown ending; valid: {', '.join(SUFFIXES)}")
    if not file.is_file():
        raise UserError(f"{key}: there is no file '{path}' (from {Path.cwd()})")
    return file


def read_file(key: str, path: str | None) -> list[dict[str, Any]]:
    """Return the rows of a JSONL or Parquet file.

    Raises:
        UserError: the file is missing, or is not what its ending says (with the line, for JSONL).
    """
    file = check_file(key, path)
    return _read_jsonl(file) if file.suffix == ".jsonl" else _read_parquet(file)


def read_hub(path: str, subset: str | None, split: str) -> list[dict[str, Any]]:
    """Return the rows of one split of a Hugging Face dataset, or of a local folder that holds one.

    Raises:
        UserError: the dataset, its configuration or its split does not exist or cannot be reached.
    """
    import datasets

    try:
        table = datasets.load_dataset(path, name=subset, split=split)
    except (OSError, ValueError) as error:
        where = f"'{path}'{f', subset {subset}' if subset else ''}, split '{split}'"
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"data.path: cannot load the dataset {where}: {cause}") from error
    return [dict(row) for row in table]


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also cut at U+2028 inside a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{number}: no valid JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number}: must be a JSON object, is a {type(row).__name__}")
        rows.append(row)
    return rows


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read as Parquet: {error}") from error
