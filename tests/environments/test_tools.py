"""Functions as tools: their schemas, and calls of them that work, that are wrong and that fail."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from typing import Any, Literal

import pytest

from sapo_rl.environments.tools import call, tools_of, tools_of_object
from sapo_rl.errors import UserError


def divide(a: float, b: float, digits: int = 2) -> float:
    """Divide two numbers.

    Args:
        a: What is divided.
        b: By what.
        digits: Digits of the result after the point.
    """
    return round(a / b, digits)


def test_tools_are_described_without_torch_which_each_worker_would_import() -> None:
    described = f"from sapo_rl.environments.tools import tools_of\n{inspect.getsource(divide)}\ntools_of([divide])"
    subprocess.run([sys.executable, "-c", f"{described}\nimport sys\nassert 'torch' not in sys.modules"], check=True)


async def search(query: str, kind: Literal["title", "text"] | None = None, ids: list[int] | None = None) -> Any:
    """Find documents.

    Args:
        query: The words.
        kind: Where.
        ids: Among which.
    """
    await asyncio.sleep(0)
    return {"query": query, "kind": kind, "ids": ids}


def either(value: list[int] | str, table: dict[str, int]) -> object:
    """Take one or the other.

    Args:
        value: Numbers, or a word.
        table: Numbers by name.
    """
    return object() if value == "object" else [value, table]


TOOLS = tools_of([divide, search, either])


def run(name: str, **arguments: Any) -> tuple[str, bool]:
    return asyncio.run(call(TOOLS, name, arguments))


def test_a_schema_says_names_types_and_what_must_be_given() -> None:
    function = TOOLS["divide"].schema["function"]
    assert (function["name"], function["description"]) == ("divide", "Divide two numbers.")
    assert function["parameters"]["properties"]["digits"]["type"] == "integer"
    assert function["parameters"]["required"] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("divide", {"a": 1, "b": 3}, "0.33"),
        ("divide", {"a": 1, "b": 3, "digits": 4.0}, "0.3333"),
        ("search", {"query": "é"}, '{"query": "é", "kind": null, "ids": null}'),
        ("search", {"query": "a", "kind": "text", "ids": [1, 2.0]}, '{"query": "a", "kind": "text", "ids": [1, 2]}'),
        ("search", {"query": "a", "ids": None}, '{"query": "a", "kind": null, "ids": null}'),
        ("either", {"value": "a", "table": {"b": 1.0}}, '["a", {"b": 1}]'),
        ("either", {"value": [1], "table": {}}, "[[1], {}]"),
    ],
)
def test_a_call_brings_its_result_as_text(name: str, arguments: dict[str, Any], text: str) -> None:
    assert run(name, **arguments) == (text, False)


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("divid", {}, "error: there is no tool 'divid'; did you mean 'divide'? valid: divide, either, search"),
        ("divide", {"a": 1}, "error: divide: argument 'b' is missing"),
        ("divide", {"a": 1, "b": 2, "c": 3}, "unknown argument 'c'; its arguments are: a, b, digits"),
        ("divide", {"a": "1", "b": 2}, "error: divide: argument 'a' must be of type number, not \"1\""),
        ("divide", {"a": True, "b": 2}, "argument 'a' must be of type number, not true"),
        ("divide", {"a": 1, "b": 2, "digits": 1.5}, "argument 'digits' must be of type integer, not 1.5"),
        ("divide", {"a": None, "b": 2}, "argument 'a' must be of type number, not null"),
        ("divide", {"a": 1, "b": 0}, "error: divide: ZeroDivisionError: division by zero"),
        ("search", {"query": "a", "kind": "all"}, 'argument \'kind\' must be one of ["title", "text"]'),
        ("search", {"query": "a", "ids": [1, "2"]}, "argument 'ids[1]' must be of type integer, not \"2\""),
        ("either", {"value": {}, "table": {}}, "argument 'value' must be of type"),
        ("either", {"value": "a", "table": {"b": "c"}}, "argument 'table.b' must be of type integer"),
        ("either", {"value": "object", "table": {}}, "TypeError: Object of type object is not JSON serializable"),
    ],
)
def test_what_is_wrong_with_a_call_is_told_to_the_model(name: str, arguments: dict[str, Any], text: str) -> None:
    said, failed = run(name, **arguments)
    assert text in said and said.startswith("error: ") and failed


class Board:
    """An environment as TRL documents them."""

    kind = "chess"

    def __init__(self) -> None:
        self.moves: list[str] = []

    @property
    def done(self) -> bool:
        return len(self.moves) > 1

    def reset(self, **row: Any) -> str | None:
        return "play"

    def get_reward(self) -> float:
        return 1.0

    def move(self, where: str) -> str:
        """Move.

        Args:
            where: A square.
        """
        self.moves.append(where)
        return f"{len(self.moves)} moves"

    def _helper(self, x):
        return x


def test_an_environments_public_methods_are_its_tools() -> None:
    board = Board()
    tools = tools_of_object(board)
    assert list(tools) == ["move"]
    assert asyncio.run(call(tools, "move", {"where": "e4"})) == ("1 moves", False)
    assert board.moves == ["e4"]


def bare(a: int) -> int:
    return a


def untyped(a) -> int:
    """Take a."""
    return a


def loose(*values: int) -> int:
    """Add.

    Args:
        values: Numbers.
    """
    return sum(values)


@pytest.mark.parametrize(
    ("functions", "problem"),
    [
        ([bare], "tools: bare: .* no docstring"),
        ([untyped], "tools: untyped: Argument a is missing a type hint"),
        ([loose], "tools: loose: its arguments must have names"),
        ([divide, divide], "tools: two are called 'divide'"),
    ],
)
def test_a_function_that_is_no_tool_is_told(functions: list[Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        tools_of(functions)
