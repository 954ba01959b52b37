"""Rewards for programs: what a reply holds is run in a sandbox, against the tests of its row."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sapo_rl.config import RewardConfig
from sapo_rl.errors import UserError
from sapo_rl.processes.sandbox import Isolation, Job, Limits, Result, check, run
from sapo_rl.rewards.registry import REWARD_FUNCTIONS, Completion
from sapo_rl.rewards.text import text_of

_BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "python3", "py")
_CLOSE = 1e-6  # relative difference of numbers that counts as none


@REWARD_FUNCTIONS.register_module("code")
def code(
    completions: list[Completion],
    answer: list[Any],
    setup: list[Any] | None = None,
    entry_point: list[Any] | None = None,
    *,
    partial: bool = False,
    cpu_seconds: int = 5,
    memory_mb: int = 512,
    sandbox: str = "bubblewrap",
    **columns: list[Any],
) -> list[float | None]:
    r"""1 where the reply's Python program passes all tests of its row; None where the row has none.

    The program is the last code block marked as Python, else the last block, else all that follows the last
    `</think>`. The tests are the answer, or that as JSON:

    * statements, as one text or a list of them (MBPP): they run in the program's names, and one that raises has failed;
      with a column `entry_point`, a text defines `check(candidate)`, which gets the function of that name (HumanEval);
    * pairs `{input, output}`, or `{inputs: [...], outputs: [...]}`: the program reads the one and prints the other,
      compared word by word;
    * `{fn_name, inputs, outputs}`: calls of a function, or of a method of the class `Solution`, with lists of
      arguments; what they return is compared as JSON, numbers to a millionth.

    Args:
        completions: the replies.
        answer: their tests.
        setup: code that runs before the program, where the data has such a column.
        entry_point: names of the functions that `check` gets, likewise.
        partial: return the share of tests that are passed instead.
        cpu_seconds: computing time of a program, for all statements or calls, or for one input; three times that on
            the clock.
        memory_mb: memory of a program, in units of 2^20 bytes.
        sandbox: `bubblewrap`, or `none` for limits alone.
        columns: of the data.

    Raises:
        ValueError: tests of another shape.
        UserError: unusable settings, or a machine without bubblewrap.

    Example:
        >>> code(["```python\ndef double(x):\n    return 2 * x\n```"], [["assert double(2) == 4"]])
        [1.0]
    """
    try:
        judge = _Judge(Limits.of(cpu_seconds, memory_mb), check(sandbox), partial)
    except ValueError as error:
        raise UserError(f"code: {error}") from error
    if not completions:
        return []
    nothing = [None] * len(completions)
    programs = [program_of(text_of(completion)) for completion in completions]
    rows = zip(programs, answer, setup or nothing, entry_point or nothing, strict=True)
    return asyncio.run(judge.scores([None if row[1] is None else tests_of(*row) for row in rows]))


def isolation_warning(cfg: RewardConfig) -> str | None:
    """Return what to tell a user whose config runs programs without a sandbox; None where it does not."""
    for name, function in cfg.functions.items():
        if function.function == "code" and function.args.get("sandbox") == "none":
            return (
                f"reward.functions.{name}.args.sandbox: is none: what the model writes runs with limits on time and "
                "memory, but it reads and writes your files as you do"
            )
    return None


def program_of(reply: str) -> str:
    """Return the program in a reply: the last block marked as Python, else the last block, else the whole reply.

    What precedes the last `</think>` is not read.
    """
    reply = reply.rpartition("</think>")[2]
    blocks = _BLOCK.findall(reply)
    marked = [body for language, body in blocks if language.lower() in _PYTHON]
    return (marked or [body for _, body in blocks] or [reply])[-1]


@dataclass(frozen=True)
class Test:
    """A run of a program, and how many of its tests that has passed.

    Example:
        >>> Test(Job("print(1)"), 1, lambda result: int(result.stdout.split() == ["1"]))
    """

    job: Job
    count: int
    """Tests in it."""
    passed: Callable[[Result], int]
    """How many of them a result has passed."""


def tests_of(program: str, tests: Any, setup: str | None = None, entry_point: str | None = None) -> list[Test]:
    """Return the runs in which a program is tested.

    Args:
        program: what the model wrote; a body alone goes on where `setup` ends.
        tests: of a row, as `code` takes them.
        setup: code that runs before it.
        entry_point: name of the function that `check`, defined by `tests`, gets.

    Raises:
        ValueError: tests of another shape, or none.
    """
    program = _joined(setup or "", program)
    if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{"):
        tests = json.loads(tests)
    if isinstance(tests, str):
        tests = [f"{tests}\ncheck({entry_point})" if entry_point else tests]
    if isinstance(tests, dict) and tests.keys() >= {"inputs", "outputs"}:
        pairs = [*zip(tests["inputs"], tests["outputs"], strict=True)]
        if name := tests.get("fn_name"):
            return [_calls(program, name, pairs)]
        tests = [{"input": given, "output": expected} for given, expected in pairs]
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"the tests are {str(tests)[:60]!r}; must be statements, or inputs and outputs")
    if all(isinstance(one, str) for one in tests):
        job = Job(program, checks=tests)
        return [Test(job, len(tests), lambda result: sum(one["passed"] for one in result.reports))]
    if all(isinstance(one, dict) and one.keys() >= {"input", "output"} for one in tests):
        return [_printed(program, _text(one["input"]), _text(one["output"])) for one in tests]
    raise ValueError(f"the tests begin with {str(tests[0])[:60]!r}; must be statements, or have input and output")


class _Judge:
    """Runs the tests of some programs, as many at a time as there are processors."""

    def __init__(self, limits: Limits, isolation: Isolation, partial: bool) -> None:
        self._limits, self._partial = limits, partial
        self._isolation: Isolation = isolation
        self._room = asyncio.Semaphore(len(os.sched_getaffinity(0)))

    async def scores(self, programs: Sequence[list[Test] | None]) -> list[float | None]:
        """Return what each program earns; None for one without tests."""
        return await asyncio.gather(*map(self._score, programs))

    async def _score(self, tests: list[Test] | None) -> float | None:
        if tests is None:
            return None
        passed = 0
        for test in tests:
            async with self._room:
                found = test.passed(await run(test.job, self._limits, self._isolation))
            if found < test.count and not self._partial:
                return 0.0
            passed += found
        return passed / sum(test.count for test in tests)


def _joined(setup: str, program: str) -> str:
    """The program after its setup; with a body alone they are one text."""
    try:
        compile(program, "program.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return setup + program
    return f"{setup}\n{program}"


def _printed(program: str, given: str, expected: str) -> Test:
    return Test(
        Job(program, stdin=given),
        1,
        lambda result: int(not result.stopped and result.stdout.split() == expected.split()),
    )


def _calls(program: str, name: str, pairs: list[tuple[Any, Any]]) -> Test:
    def passed(result: Result) -> int:
        found = zip(result.reports, pairs, strict=False)
        return sum("value" in told and _as_expected(told["value"], expected) for told, (_, expected) in found)

    arguments = [given if isinstance(given, list) else [given] for given, _ in pairs]
    return Test(Job(program, function=name, calls=arguments), len(pairs), passed)


def _as_expected(value: Any, expected: Any) -> bool:
    """Whether a call has returned what it should; APPS wraps that in a list of one."""
    wrapped = isinstance(expected, list) and len(expected) == 1
    return _same(value, expected) or (wrapped and _same(value, expected[0]))


def _same(value: Any, expected: Any) -> bool:
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return value == expected or math.isclose(value, expected, rel_tol=_CLOSE)
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_same, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(_same(value[key], expected[key]) for key in value)
    return value == expected


def _text(value: Any) -> str:
    """What a program reads or prints; some data has it in lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)
