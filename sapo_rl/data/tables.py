"""Rows of local files (JSONL, Parquet) and of Hugging Face datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapo_rl.errors import UserError, first_line
from sapo_rl.errors.files import expand, is_file, parse_json, text_in

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".jsonl", ".parquet")


def check_file(key: str, path: str | None) -> Path:
    """Return the path that the config has under `key`, known to exist and to be of a known kind.

    Raises:
        UserError: otherwise.
    """
    if not path:
        raise UserError(f"{key}: is missing; the path of a file that ends in {' or '.join(SUFFIXES)}")
    file = expand(path)
    if file.suffix not in SUFFIXES:
        raise UserError(f"{key}: '{path}' has an unknown ending; valid: {', '.join(SUFFIXES)}")
    if not is_file(file):
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
        return [dict(row) for row in table]
    except Exception as error:  # whatever the dataset's files have the library raise
        where = f"'{path}'{f', subset {subset}' if subset else ''}, split '{split}'"
        told = error.__cause__ or error  # the library wraps what a file is at fault for
        cause = next(iter(str(told).splitlines()), "") or type(told).__name__
        raise UserError(f"data.path: cannot load the dataset {where}: {cause}") from error


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text_in(file).split("\n"), start=1):  # splitlines would cut at U+2028 in a string
        if not line.strip():
            continue
        row = parse_json(line, f"{file}:{number}")
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number}: must be a JSON object, is a {type(row).__name__}")
        rows.append(row)
    return rows


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(file).names
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise UserError(f"{file}: has two columns called '{doubled[0]}'; rename one")
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
        raise UserError(f"{file}: cannot be read as Parquet: {first_line(error)}") from error
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*_columns(table, file), strict=True)]


def _columns(table: Any, file: Path) -> list[list[Any]]:
    """The values of each column; raises UserError with column and row where one has no equal in Python."""
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            columns.append(column.to_pylist())
        except Exception:  # such as a date beyond Python's
            columns.append(_one_by_one(name, column, file))
    return columns


def _one_by_one(name: str, column: Any, file: Path) -> list[Any]:
    values: list[Any] = []
    try:
        for scalar in column:
            values.append(scalar.as_py())
    except Exception as error:
        raise UserError(f"{file}: column '{name}', row {len(values)}: {type(error).__name__}: {error}") from error
    return values


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file so that a reader sees the old one or the whole new one, never a part."""
    import pyarrow.parquet as pq

    part = path.with_name(f".{path.name}.part")
    pq.write_table(table, part, compression="zstd")
    part.replace(path)
