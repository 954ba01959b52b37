"""Rewards for programs: what a reply holds is run in a sandbox, against the tests of its row."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sapo_rl.config import RewardFunctionConfig
from sapo_rl.config.reward import key_of
from sapo_rl.errors import UserError
from sapo_rl.processes.sandbox import Job, Limits, Result, Sandbox, check, processors, reach, room, run
from sapo_rl.rewards.registry import AT_ONCE, CHECKS, PREPARATIONS, REWARD_FUNCTIONS, USUALLY_AT_ONCE, Completion
from sapo_rl.rewards.text import text_of
from sapo_rl.rewards.waiting import all_of

_BLOCK = re.compile(r"^[ \t]*+```[ \t]*+(\w*+)[^\n]*+\n(.*?)^[ \t]*+```", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "python3", "py")
_CPU_SECONDS = 5
_CLOSE = 1e-6  # relative difference of numbers that counts as none


@REWARD_FUNCTIONS.register_module("code")
async def code(
    completions: list[Completion],
    answer: list[Any],
    setup: list[Any] | None = None,
    entry_point: list[Any] | None = None,
    *,
    partial: bool = False,
    cpu_seconds: int = _CPU_SECONDS,
    memory_mb: int = 512,
    sandbox: str | dict[str, Any] = "bubblewrap",
    **columns: list[Any],
) -> list[float | None]:
    r"""1 where the reply's Python program passes all tests of its row; None where the row has none.

    The program is the last code block marked as Python, else the last block, else all that follows the last
    `</think>`. The tests are the answer, or that as JSON:

    * statements, as one text or a list of them (MBPP): they run in the program's names, and one that raises has failed;
      where one defines `check(candidate)`, it gets the function that the column `entry_point` names (HumanEval);
    * pairs `{input, output}`, or `{inputs: [...], outputs: [...]}`: the program reads the one, prints the other,
      compared word by word, and ends without an error;
    * `{fn_name, inputs, outputs}`: calls of a function, or of a method of the class `Solution`, with lists of
      arguments; what they return is compared as JSON, numbers to a millionth.

    Args:
        completions: the replies.
        answer: their tests.
        setup: code that runs before the program, where the data has such a column.
        entry_point: names of the functions that `check` gets, likewise.
        partial: return the share of tests that are passed instead.
        cpu_seconds: computing time of a program, for all statements or calls, or for one input; three times that on
            the clock for all of these together, the start of Python left out. What it has not passed by then it fails.
        memory_mb: memory of a program, in units of 2^20 bytes.
        sandbox: `bubblewrap`, `none` for limits alone, or `{url: ...}` of a service that speaks as SandboxFusion does
            (`Service`).
        columns: of the data.

    Raises:
        ValueError: tests of another shape.
        UserError: unusable settings, or a machine without bubblewrap.
        OSError: the sandbox, or its service, did not run a program.

    Example:
        >>> asyncio.run(code(["```python\ndef double(x):\n    return 2 * x\n```"], [["assert double(2) == 4"]]))
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
    return await judge.scores([None if row[1] is None else tests_of(*row) for row in rows])


def isolation_warning(functions: Mapping[str, RewardFunctionConfig]) -> str | None:
    """Return what to tell a user one of whose functions runs programs without a sandbox; None where none does."""
    for name, function in functions.items():
        if function.function == "code" and function.args.get("sandbox") == "none":
            return (
                f"{key_of(name)}.args.sandbox: is none: what the model writes runs with limits on time and memory, "
                "but it reads and writes your files as you do"
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
    longest: int = 0
    """Bytes that it may print, where that is more than others may."""


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
    if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{"):
        tests = json.loads(tests)
    if isinstance(tests, str):
        tests = [tests]
    if isinstance(tests, dict) and tests.keys() >= {"inputs", "outputs"}:
        pairs = [*zip(tests["inputs"], tests["outputs"], strict=True)]
        if name := tests.get("fn_name"):
            return [_calls(Job(program, setup or ""), name, pairs)]
        tests = [{"input": given, "output": expected} for given, expected in pairs]
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"the tests are {str(tests)[:60]!r}; must be statements, or inputs and outputs")
    if all(isinstance(one, str) for one in tests):
        tests = [f"{one}\ncheck({entry_point})" if entry_point and "def check(" in one else one for one in tests]
        return [Test(Job(program, setup or "", checks=tests), len(tests), lambda result: _passed(result, len(tests)))]
    if all(isinstance(one, dict) and one.keys() >= {"input", "output"} for one in tests):
        return [_printed(Job(program, setup or ""), _text(one["input"]), _text(one["output"])) for one in tests]
    raise ValueError(f"the tests begin with {str(tests[0])[:60]!r}; must be statements, or have input and output")


class _Judge:
    """Runs the tests of some programs."""

    def __init__(self, limits: Limits, sandbox: Sandbox, partial: bool) -> None:
        self._limits, self._partial = limits, partial
        self._sandbox: Sandbox = sandbox

    async def scores(self, programs: Sequence[list[Test] | None]) -> list[float | None]:
        """Return what each program earns; None for one without tests."""
        return await all_of(map(self._score, programs))

    async def _score(self, tests: list[Test] | None) -> float | None:
        if tests is None:
            return None
        passed, left = 0, self._limits.seconds
        for test in tests:
            longest = max(self._limits.output_bytes, test.longest)
            async with room(self._sandbox):
                result = await run(test.job, replace(self._limits, seconds=left, output_bytes=longest), self._sandbox)
            passed += (found := test.passed(result))
            left -= result.seconds
            if (found < test.count and not self._partial) or left <= 0:
                break
        if not self._partial:
            return float(passed == sum(test.count for test in tests))
        return passed / sum(test.count for test in tests)


def _passed(result: Result, count: int) -> int:
    """How many of so many statements have passed; reports may be a program's own inventions."""
    return sum(one.get("passed") is True for one in result.reports[:count])


def _printed(job: Job, given: str, expected: str) -> Test:
    words = expected.split()
    return Test(
        replace(job, stdin=given),
        1,
        lambda result: int(result.exit_code == 0 and not result.stopped and result.stdout.split() == words),
        longest=2 * len(expected.encode(errors="replace")),
    )


def _calls(job: Job, name: str, pairs: list[tuple[Any, Any]]) -> Test:
    def passed(result: Result) -> int:
        found = zip(result.reports, pairs, strict=False)
        return sum("value" in told and _as_expected(told["value"], expected) for told, (_, expected) in found)

    arguments = [given if isinstance(given, list) else [given] for given, _ in pairs]
    return Test(replace(job, function=name, calls=arguments), len(pairs), passed)


def _as_expected(value: Any, expected: Any) -> bool:
    """Whether a call has returned what it should; APPS wraps that in a list of one."""
    wrapped = isinstance(expected, list) and len(expected) == 1
    return _same(value, expected) or (wrapped and _same(value, expected[0]))


def _same(value: Any, expected: Any) -> bool:
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        with contextlib.suppress(OverflowError):  # of a whole number beyond all floats
            return value == expected or math.isclose(value, expected, rel_tol=_CLOSE)
        return False
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_same, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(_same(value[key], expected[key]) for key in value)
    return value == expected


def _text(value: Any) -> str:
    """What a program reads or prints; some data has it in lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _check_timeout(name: str, cfg: RewardFunctionConfig) -> None:
    """Refuse a `timeout` that a program can exceed whatever it does: the reply would fail instead of earning 0."""
    seconds = int(cfg.args.get("cpu_seconds", _CPU_SECONDS))
    if cfg.timeout < 4 * seconds:
        raise UserError(
            f"{key_of(name)}.timeout: is {cfg.timeout:g}, too near to the {3 * seconds} seconds on the clock "
            f"that a program has with cpu_seconds={seconds}; set {4 * seconds} or more"
        )


def _prepare(sandbox: str | dict[str, Any] = "bubblewrap", **settings: Any) -> None:
    """Have a service run a program, or raise UserError."""
    try:
        reach(check(sandbox))
    except ValueError as error:
        raise UserError(f"code: {error}") from error


def _at_once(sandbox: str | dict[str, Any] = "bubblewrap", **settings: Any) -> int:
    """More would wait for processors while the clock of their `timeout` runs; a service has its own."""
    return USUALLY_AT_ONCE if isinstance(sandbox, Mapping) else processors()


CHECKS["code"] = _check_timeout
AT_ONCE["code"] = _at_once
PREPARATIONS["code"] = _prepare
