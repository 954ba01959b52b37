"""Tasks for programs from files that people know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sapo_rl.data.tables import read_file
from sapo_rl.errors import UserError

_NAMES = {
    "prompt": ("text", "prompt"),
    "tests": ("test_list", "tests"),
    "setup": ("test_setup_code", "test_imports", "setup"),
}
"""Columns of a row by what MBPP's files call them."""


def mbpp(path: str, shown: int = 1) -> Iterator[dict[str, Any]]:
    """Give the tasks of an MBPP file (arXiv 2108.07732), JSONL or Parquet: `prompt`, `tests`, `setup`, and its number.

    Its sanitized edition is read too, where the setup is a list of imports.

    Args:
        path: the file, with its own columns (text or prompt, test_list, test_setup_code or test_imports) or ours.
        shown: tests that the prompt shows, by which the model learns the function's name; rewards take all.

    Raises:
        UserError: no such file, or a row without a task or tests.
    """
    for number, row in enumerate(read_file("data.args.path", path)):
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
