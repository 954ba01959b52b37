"""Tasks for programs that people know, from files or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sapo_rl.data.tables import SUFFIXES, read_file, read_hub
from sapo_rl.errors import UserError

_NAMES = {
    "prompt": ("text", "prompt"),
    "tests": ("test_list", "tests"),
    "setup": ("test_setup_code", "test_imports", "setup"),
}
"""Columns of a row by what MBPP's files call them."""


def mbpp(path: str, shown: int = 1, split: str = "train") -> Iterator[dict[str, Any]]:
    """Give the tasks of MBPP (arXiv 2108.07732): `prompt`, `tests`, `setup`, and its number.

    Its sanitized edition is read too, where the setup is a list of imports.

    Args:
        path: a JSONL or Parquet file, or a name on the hub, with its own columns (text or prompt, test_list,
            test_setup_code or test_imports) or ours.
        shown: tests that the prompt shows, by which the model learns the function's name; rewards take all.
        split: which part, of a dataset on the hub.

    Raises:
        UserError: no such file or dataset, or a row without a task or tests.
    """
    for number, row in enumerate(_rows(path, split)):
        found = {name: next((row[one] for one in known if one in row), None) for name, known in _NAMES.items()}
        tests = found["tests"] if isinstance(found["tests"], list) else []
        if not isinstance(found["prompt"], str) or not tests or not all(isinstance(one, str) for one in tests):
            raise UserError(
                f"row {number} of {path}: is no task of MBPP, which has {' or '.join(_NAMES['prompt'])}, tests"
            )
        shows, setup = "\n".join(tests[:shown]), found["setup"]
        asked = f"{found['prompt']}\nThe program must pass this:\n```python\n{shows}\n```" if shows else found["prompt"]
        yield {
            "task": row.get("task_id", row.get("id", number)),
            "prompt": asked,
            "tests": tests,
            "setup": "\n".join(setup) if isinstance(setup, list) else setup,
        }


def humaneval(path: str = "openai/openai_humaneval", split: str = "test") -> Iterator[dict[str, Any]]:
    """Give the functions of HumanEval (arXiv 2107.03374) to complete: `prompt`, `tests`, `entry_point` and `setup`.

    The setup is the beginning of the function, so that a reply may be its body alone or all of it.

    Args:
        path: a JSONL or Parquet file, or a name on the hub, with the columns prompt, test and entry_point.
        split: which part, of a dataset on the hub.

    Raises:
        UserError: no such file or dataset, or a row without one of these.
    """
    for number, row in enumerate(_rows(path, split)):
        beginning, tests, name = (row.get(column) for column in ("prompt", "test", "entry_point"))
        if not (isinstance(beginning, str) and isinstance(tests, str) and isinstance(name, str)):
            raise UserError(f"row {number} of {path}: is no task of HumanEval, which has prompt, test and entry_point")
        asked = "Complete this Python function. Reply with all of it in one code block."
        yield {
            "task": row.get("task_id", number),
            "prompt": f"{asked}\n```python\n{beginning}```",
            "tests": [tests],
            "entry_point": name,
            "setup": beginning,
        }


def _rows(path: str, split: str) -> list[dict[str, Any]]:
    return read_file("data.args.path", path) if path.endswith(SUFFIXES) else read_hub(path, None, split)
