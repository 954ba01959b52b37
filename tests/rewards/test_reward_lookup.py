"""Names of reward functions: found, or refused with what would be valid."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sapo_rl.config import RewardFunctionConfig
from sapo_rl.errors import UserError
from sapo_rl.rewards import REWARD_FUNCTIONS, check_function, numeric_answer, resolve
from sapo_rl.rewards.lookup import check_own_arguments

MODULE = """
def accuracy(completions, **columns):
    return [1.0 for _ in completions]

limit = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def check(function: str, **args: Any) -> None:
    check_function("mine", RewardFunctionConfig(function=function, args=args))


def test_built_in_names_resolve() -> None:
    assert resolve("numeric_answer") is numeric_answer
    assert set(REWARD_FUNCTIONS) == {
        *("code", "judge", "reward_model", "exact_match", "format_tags", "length_limit", "math_verify"),
        *("numeric_answer", "numeric_digits", "squad_exact_match", "squad_f1", "reasoning_gym", "regex"),
    }


def test_a_module_of_the_current_directory_resolves(here: Path) -> None:
    (here / "lookup_plain.py").write_text(MODULE)
    check("lookup_plain.accuracy")
    assert resolve("lookup_plain.accuracy")(completions=["a", "b"]) == [1.0, 1.0]


def test_checking_imports_nothing_of_the_users(here: Path) -> None:
    package = here / "lookup_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "inner.py").write_text("raise RuntimeError('imported')\ndef accuracy(): ...")
    check("lookup_package.inner.accuracy")
    with pytest.raises(UserError, match=r"'lookup_package\.inner' failed: RuntimeError: imported \(.*__init__\.py:1\)"):
        resolve("lookup_package.inner.accuracy")


@pytest.mark.parametrize("refuse", [check, resolve])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("numeric_anser", "did you mean 'numeric_answer'"),
        ("lookup_absent.accuracy", "there is no module 'lookup_absent'"),
        ("lookup_present.absent.accuracy", r"there is no module 'lookup_present\.absent'"),
        ("lookup_present.acuracy", "has no 'acuracy'; did you mean 'accuracy'"),
    ],
)
def test_what_is_not_there_is_named_with_the_nearest(here: Path, refuse: Any, function: str, message: str) -> None:
    (here / "lookup_present.py").write_text(MODULE)
    with pytest.raises(UserError, match=message):
        refuse(function)


def test_what_is_no_function_is_refused(here: Path) -> None:
    (here / "lookup_number.py").write_text(MODULE)
    with pytest.raises(UserError, match="is a int, not a function"):
        resolve("lookup_number.limit")


def test_a_file_that_does_not_parse_is_refused_with_its_line(here: Path) -> None:
    (here / "lookup_broken.py").write_text("x = 1\ndef accuracy(:\n")
    for refuse in (check, resolve):
        with pytest.raises(UserError, match=r"lookup_broken\.py:2"):
            refuse("lookup_broken.accuracy")


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        ("numeric_answer", {"tolerence": 1.0}, "args.tolerence: unknown argument; did you mean 'tolerance'"),
        ("numeric_answer", {"tolerance": "a"}, "tolerance: 'a' is a str, must be float"),
        ("numeric_answer", {"tolerance": -1}, "at least 0"),
        ("math_verify", {"strict": True}, "args.strict: unknown argument; it takes none"),
        ("regex", {}, "'pattern' is missing"),
        ("regex", {"pattern": "["}, "no regular expression"),
        ("length_limit", {"max_tokens": True}, "must be int"),
        ("format_tags", {"tags": [1]}, r"must be list\[str\]"),
        ("exact_match", {"completions": []}, "filled in at every call"),
    ],
)
def test_arguments_of_built_ins_are_checked(function: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        check(function, **args)
    assert "reward.functions.mine" in str(refused.value)


@pytest.mark.parametrize(
    ("function", "args"),
    [
        ("numeric_answer", {"tolerance": 1}),
        ("exact_match", {"tag": None}),
        ("format_tags", {"tags": ["a"], "trailing": True}),
        ("length_limit", {"max_tokens": 5, "soft": 2}),
        ("math_verify", {}),
        ("reasoning_gym", {}),
    ],
)
def test_valid_arguments_are_accepted(function: str, args: dict[str, Any]) -> None:
    check(function, **args)


def own(completions: list[str], answer: list[str], tolerance: float = 0.0, *, most: int) -> list[float]: ...


def everything(completions: list[str], *, most: int = 3, **columns: Any) -> list[float]: ...


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        (
            own,
            {"tolerence": 1.0},
            r"args\.tolerence: unknown argument; did you mean 'tolerance'\? valid: answer, most, ",
        ),
        (own, {"most": "many"}, r"args\.most: 'many' is a str, must be int"),
        (everything, {"most": 0.5}, r"args\.most: 0\.5 is a float, must be int"),
        (lambda completions: [], {"scale": 1}, r"args\.scale: unknown argument; it takes none"),
    ],
)
def test_arguments_that_a_users_function_does_not_take_are_refused(
    function: Any, args: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"^reward\.functions\.mine\.{message}"):
        check_own_arguments("mine", function, args)


def test_arguments_that_a_users_function_takes_are_accepted() -> None:
    check_own_arguments("mine", own, {"most": 3, "tolerance": 1})  # `answer` is a column
    check_own_arguments("mine", own, {"answer": ["fixed"]})  # what is missing is looked for among the columns
    check_own_arguments("mine", everything, {"level": 2})
    check_own_arguments("mine", type("Callable", (), {"__call__": everything})(), {"level": 2})


def test_importing_and_checking_loads_nothing_heavy() -> None:
    code = """
import sys
from sapo_rl.config import Config, RewardFunctionConfig
from sapo_rl.rewards import REWARD_FUNCTIONS, check_function
settings = {
    "judge": {"url": "http://localhost/v1", "model": "m"},
    "length_limit": {"max_tokens": 3},
    "regex": {"pattern": "x"},
    "reward_model": {"path": "nowhere"},
}
for name in REWARD_FUNCTIONS:
    args = settings.get(name, {})
    check_function("f", RewardFunctionConfig(function=name, args=args))
import sapo_rl.data
heavy = {"torch", "numpy", "transformers", "datasets", "math_verify", "reasoning_gym", "sympy"}
print(sorted(heavy & set(sys.modules)))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
