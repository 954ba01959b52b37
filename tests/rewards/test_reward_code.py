"""The reward for programs: which program is run, which tests it meets, and what it earns."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rewards.groups import group, rewards

from sapo_rl.config import RewardConfig, RewardFunctionConfig
from sapo_rl.data.programs import humaneval, mbpp
from sapo_rl.environments import Python
from sapo_rl.errors import UserError
from sapo_rl.processes.sandbox import processors, run
from sapo_rl.rewards import RewardPool, check_function, code, isolation_warning
from sapo_rl.rewards.code import program_of
from sapo_rl.rewards.registry import calls_at_once
from sapo_rl.rewards.runner.blame import Blame, Call
from sapo_rl.rewards.runner.sheet import Sheet

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
DOUBLE = "def double(x):\n    return 2 * x"
TRIPLE = "def double(x):\n    return 3 * x if x else x"
SOLUTION = "class Solution:\n    def double(self, x):\n        return (2 * x, 0.1 + 0.2)"
ECHO = "print(2 * int(input()), end=' \\n\\n')"


def scores(*args: Any, **more: Any) -> list[float | None]:
    return asyncio.run(code(*args, **more))


def score(program: str, tests: Any, **more: Any) -> float | None:
    return scores([program], [tests], **more)[0]


@pytest.mark.parametrize(
    ("reply", "program"),
    [
        ("print(1)", "print(1)"),
        ("So:\n```python\nprint(1)\n```\nThat is it.", "print(1)\n"),
        ("```python\nfirst\n```\n```py\nsecond\n```\n```\nits output\n```", "second\n"),
        ("```\nfirst\n```\nor\n  ```js\nsecond\n  ```", "second\n"),
        ("<think>\n```python\nno\n```\n</think>\nprint(2)", "\nprint(2)"),
        ("```python\nnever closed", "```python\nnever closed"),
    ],
)
def test_the_program_of_a_reply(reply: str, program: str) -> None:
    assert program_of(reply) == program


@pytest.mark.parametrize(
    ("program", "tests", "expected"),
    [
        (DOUBLE, ["assert double(1) == 2", "assert double('a') == 'aa'"], 1),
        (TRIPLE, ["assert double(0) == 0", "assert double(1) == 2"], 0),
        (DOUBLE, "assert double(1) == 2", 1),
        (DOUBLE, json.dumps(["assert double(1) == 2"]), 1),
        (ECHO, [{"input": "3\n", "output": "6"}, {"input": "4", "output": "8\n"}], 1),
        (ECHO, {"inputs": ["3", "4"], "outputs": ["6", "9"]}, 0),
        (ECHO, {"inputs": [["3", "4"]], "outputs": [["6"]]}, 1),
        (DOUBLE, {"fn_name": "double", "inputs": [[1], ["a"]], "outputs": [2, ["aa"]]}, 1),
        (TRIPLE, {"fn_name": "double", "inputs": [[0], [1]], "outputs": [0, 2]}, 0),
        (SOLUTION, {"fn_name": "double", "inputs": [[1]], "outputs": [[2, 0.3]]}, 1),
        ("double = 3", {"fn_name": "double", "inputs": [[1]], "outputs": [2]}, 0),
        ("def double(x): return x == 1", {"fn_name": "double", "inputs": [[1]], "outputs": [1]}, 0),
        ("def double(:", ["assert True"], 0),
        ("raise SystemExit(0)", ["assert True"], 0),
        ("import os\nos._exit(0)", ["assert True"], 0),
        ("print(6, flush=True)\n1 / 0", [{"input": "", "output": "6"}], 0),
        ("print(6, flush=True)\nwhile True: pass", [{"input": "", "output": "6"}], 0),
        ("print('1 ' * 99999)", [{"input": "", "output": "1 " * 99999}], 1),
        ("def double(x): return 10**400", {"fn_name": "double", "inputs": [[1]], "outputs": [2.5]}, 0),
        (DOUBLE, None, None),
    ],
)
def test_what_a_program_earns(program: str, tests: Any, expected: float | None) -> None:
    assert score(program, tests) == expected


def test_setup_runs_before_and_a_body_goes_on_where_it_ends() -> None:
    setup = "import math\ndef root(x):\n    '''The square root.'''\n"
    check = "def check(candidate):\n    assert candidate(4) == 2.0\n    assert root is candidate"
    bodies: list[Any] = ["    return math.sqrt(x)\n", "def root(x): return math.sqrt(x)", "    return x\n"]
    assert scores(bodies, [check] * 3, [setup] * 3, ["root"] * 3) == [1, 1, 0]
    assert scores(bodies, [[check]] * 3, [setup] * 3, ["root"] * 3) == [1, 1, 0]
    assert scores(bodies, ["assert root(4) == 2.0"] * 3, [setup] * 3, ["root"] * 3) == [
        1,
        1,
        0,
    ]  # it calls the function


@pytest.mark.parametrize("told", ["{'passed': 1000}", "{'passed': 'x'}", "{}", "{'passed': True}, " * 9])
def test_reports_that_a_program_makes_up_pay_no_more_than_its_tests(told: str) -> None:
    forged = (
        "import json, os, sys\nframe = sys._getframe()\nwhile 'job' not in frame.f_locals: frame = frame.f_back\n"
        "key, report = frame.f_locals['job']['key'], frame.f_locals['report']\n"
        f"for told in [{told}]: os.write(report, json.dumps({{'key': key, **told}}).encode() + b'\\n')"
    )
    assert score(forged, ["assert False"], partial=True) in (0, 1)


def test_what_a_reply_takes_for_all_its_inputs_is_bounded() -> None:
    sleeps = [{"input": str(number), "output": "x"} for number in range(20)]
    assert score("import time\ntime.sleep(1.6)\nprint('x')", sleeps, partial=True, cpu_seconds=1) == 0.05


def test_a_fence_that_ends_nowhere_is_read_once() -> None:
    reply = "```" + "a" * 200_000 + " " * 200_000
    assert program_of(reply) == reply


def test_partial_pays_for_each_test() -> None:
    assert score(TRIPLE, ["assert double(0) == 0", "assert double(1) == 2"], partial=True) == 0.5
    assert score(ECHO, {"inputs": ["3", "4", "5"], "outputs": ["6", "9", "10"]}, partial=True) == pytest.approx(2 / 3)
    assert score(DOUBLE, {"fn_name": "double", "inputs": [[1], [2]], "outputs": [2, 5]}, partial=True) == 0.5


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ([], "the tests are '[]'; must be statements, or inputs and outputs"),
        (7, "the tests are '7'"),
        ([{"in": 1}], "the tests begin with \"{'in': 1}\"; must be statements, or have input and output"),
    ],
)
def test_tests_of_another_shape_are_refused(tests: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("[", r"\[").replace("{", r"\{")):
        score(DOUBLE, tests)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"sandbox": "docker"}, "code: sandbox is 'docker'; valid: bubblewrap, none"),
        ({"cpu_seconds": 0}, "needs cpu_seconds >= 1"),
        ({"memory_mb": 8}, "memory_mb >= 64, got 5 and 8"),
        ({"seconds": 1}, "seconds"),
    ],
)
def test_settings_are_checked_before_anything_runs(args: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_function("passed", RewardFunctionConfig("code", args=args))


def test_a_time_limit_that_a_program_can_exceed_is_refused() -> None:
    check_function("passed", RewardFunctionConfig("code", timeout=40, args={"cpu_seconds": 10}))
    said = r"reward\.functions\.passed\.timeout: is 30, too near to the 30 seconds .* cpu_seconds=10; set 40 or more"
    with pytest.raises(UserError, match=said):
        check_function("passed", RewardFunctionConfig("code", args={"cpu_seconds": 10}))


def test_the_time_limit_of_a_group_is_that_of_its_programs_together() -> None:
    functions = {"passed": RewardFunctionConfig("code"), "exact": RewardFunctionConfig("exact_match")}
    sheet = Sheet([group(0, ["a"] * 16)], functions)
    blame, places = Blame(functions), sheet.places[0]
    assert blame.limit(Call("passed", sheet, places)) == 16 * 30
    assert blame.limit(Call("exact", sheet, places)) == 30


def test_a_pool_scores_programs_and_a_hostile_one_harms_none(tmp_path: Path) -> None:
    hostile = "import os, signal\nfor victim in (os.getppid(), 1, -1):\n    os.kill(victim, signal.SIGKILL)"
    groups = [group(0, [DOUBLE, hostile, "while True: pass"], answer=["assert double(2) == 4"])]
    config = RewardConfig(functions={"passed": RewardFunctionConfig("code", args={"cpu_seconds": 1})})
    with RewardPool(config, tmp_path / "log") as pool:
        assert rewards(pool.score(groups).groups, "passed") == [[1, 0, 0]]


@pytest.mark.skipif(processors() < 2, reason="needs two processors")
def test_groups_are_judged_side_by_side(tmp_path: Path) -> None:
    wait = "import os, time\nwhile not os.path.exists(there): time.sleep(0.01)"
    meets = f"here, there = {{}}\nopen(here, 'w').close()\n{wait}"
    files = [str(tmp_path / name) for name in ("a", "b")]
    programs = [meets.format(files), meets.format(files[::-1])]  # each ends when the other has begun
    groups = [group(index, [program], answer=["pass"]) for index, program in enumerate(programs)]
    config = RewardConfig(functions={"passed": RewardFunctionConfig("code", args={"sandbox": "none"})})
    with RewardPool(config, tmp_path / "log") as pool:
        assert rewards(pool.score(groups).groups, "passed") == [[1], [1]]


def test_a_rank_judges_as_many_groups_at_once_as_it_has_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    assert calls_at_once(RewardFunctionConfig("code")) == 32
    assert calls_at_once(RewardFunctionConfig("code", args={"sandbox": {"url": "http://127.0.0.1:1"}})) == 64
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert calls_at_once(RewardFunctionConfig("code")) == 4
    assert calls_at_once(RewardFunctionConfig("code", concurrency=6)) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert calls_at_once(RewardFunctionConfig("code")) == 1


def test_only_a_config_without_a_sandbox_is_warned_of() -> None:
    assert isolation_warning({"passed": RewardFunctionConfig("code")}) is None
    bare = {"passed": RewardFunctionConfig("code", args={"sandbox": "none"})}
    assert "reward.functions.passed.args.sandbox: is none" in str(isolation_warning(bare))


def test_the_tool_python_shows_what_was_printed() -> None:
    tool = Python(cpu_seconds=1, most=60)
    assert asyncio.run(tool.python("print(6 * 7)")) == "42\n"
    assert asyncio.run(tool.python("x = 1")) == "(it printed nothing)"
    assert asyncio.run(tool.python("1 / 0")).endswith("ZeroDivisionError: division by zero\n")
    assert asyncio.run(tool.python("while True: pass")) == "\n(stopped: it took longer than 1 seconds, or crashed)"
    assert asyncio.run(tool.python("while True: print(7)")).endswith("(stopped: it printed too much)")


def test_no_more_programs_of_the_tool_run_at_the_same_time_than_may(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way: list[int] = []

    async def counted(*given: Any) -> Any:
        under_way.append(1 + (under_way[-1] if under_way else 0))
        found = await run(*given)
        under_way.append(under_way[-1] - 1)
        return found

    monkeypatch.setattr("sapo_rl.environments.python.run", counted)

    async def use() -> list[str]:
        return await asyncio.gather(*(Python(at_once=2).python(f"print({number})") for number in range(6)))

    assert asyncio.run(use()) == [f"{number}\n" for number in range(6)]
    assert max(under_way) == 2
    with pytest.raises(ValueError, match="at_once is 0, must be at least 1"):
        Python(at_once=0)


def test_tasks_of_mbpp(tmp_path: Path) -> None:
    file = tmp_path / "mbpp.jsonl"
    row = {"task_id": 2, "text": "Double x.", "test_list": ["assert double(1) == 2", "pass"], "test_setup_code": ""}
    file.write_text(json.dumps(row))
    asked = "Double x.\nThe program must pass this:\n```python\nassert double(1) == 2\n```"
    assert list(mbpp(str(file))) == [{"task": 2, "prompt": asked, "tests": row["test_list"], "setup": ""}]
    assert next(mbpp(str(file), shown=0))["prompt"] == "Double x."
    sanitized = {"prompt": "Double x.", "test_list": ["assert math.pi"], "test_imports": ["import math", "import re"]}
    file.write_text(json.dumps(sanitized))
    assert next(mbpp(str(file)))["setup"] == "import math\nimport re"
    for wrong in ({"text": "Double x."}, {"text": "Double x.", "tests": [{"input": "1", "output": "2"}]}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="is no task of MBPP, which has text or prompt, tests"):
            list(mbpp(str(file)))


def test_functions_of_humaneval_are_completed_or_written_anew(tmp_path: Path) -> None:
    file = tmp_path / "humaneval.jsonl"
    beginning = 'from typing import List\n\n\ndef double(xs: List[int]) -> List[int]:\n    """Double each."""\n'
    tests = "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n"
    row = {"task_id": "HumanEval/0", "prompt": beginning, "test": tests, "entry_point": "double"}
    file.write_text(json.dumps(row) + "\n")
    (task,) = humaneval(str(file))
    assert beginning in task["prompt"] and (task["task"], task["setup"]) == ("HumanEval/0", beginning)
    whole = "```python\ndef double(xs: List[int]) -> List[int]:\n    return [2 * x for x in xs]\n```"
    body = "```python\n    return [2 * x for x in xs]\n```"
    wrong = "```python\ndef double(xs):\n    return xs\n```"
    columns = {"answer": [task["tests"]] * 3, "setup": [task["setup"]] * 3, "entry_point": ["double"] * 3}
    assert scores([whole, body, wrong], **columns) == [1.0, 1.0, 0.0]
    file.write_text(json.dumps(row | {"test": None}) + "\n")
    with pytest.raises(UserError, match=r"^row 0 of .* is no task of HumanEval, which has prompt, test"):
        list(humaneval(str(file)))
