"""The form of the code: short functions, classes and files, whole signatures, imports that run downward."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sapo_rl"
FUNCTION, CLASS, FILE, LOOP = 60, 200, 400, 110
"""Most lines of each; the loop is train.py, the whole file."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def trees() -> dict[str, ast.Module]:
    """Every module by its path below sapo_rl/."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def places(kinds: type[ast.AST] | tuple[type[ast.AST], ...], wrong: Callable[..., bool]) -> list[str]:
    """`file:line name` of every node of these kinds for which `wrong` holds."""
    return [
        f"{path}:{node.lineno} {node.name}"  # type: ignore[attr-defined]
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, kinds) and wrong(node)
    ]


def lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def bare(node: Function) -> bool:
    """Whether a parameter other than self and cls, or the result, has no annotation."""
    parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    named = [one for one in parameters if one is not None and one.arg not in ("self", "cls")]
    return node.returns is None or any(one.annotation is None for one in named)


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of what is imported when the code runs: not that for annotations alone."""
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"line {node.lineno}: relative import"
            whole = node.module == "sapo_rl"
            yield from ((node.lineno, f"{node.module}.{one.name}" if whole else node.module) for one in node.names)


def package_of(name: str) -> str:
    """The package of a path below sapo_rl/."""
    return name.split("/")[0].removesuffix(".py")


@cache
def levels() -> dict[str, int]:
    """Every package that docs/architecture.md lists, with its line, counted from the bottom."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = page.partition("\n## Packages\n")[2].split("```")[1]
    rows = [row.partition("#")[0].split() for row in block.strip().splitlines()]
    return {package: level for level, packages in enumerate(reversed(rows)) for package in packages}


def ours(path: str) -> list[tuple[int, str]]:
    """Line and package of each import from another package."""
    found = ((line, name.split(".")[1]) for line, name in imports(trees()[path]) if name.startswith("sapo_rl."))
    return [(line, package) for line, package in found if package in levels() and package != package_of(path)]


def test_functions_and_classes_are_short() -> None:
    assert places(Function.__args__, lambda node: lines(node) > FUNCTION) == []
    assert places(ast.ClassDef, lambda node: lines(node) > CLASS) == []


def test_files_are_short() -> None:
    sizes = {path: len((PACKAGE / path).read_text(encoding="utf-8").splitlines()) for path in trees()}
    assert {path: size for path, size in sizes.items() if size > FILE} == {}
    assert sizes["train.py"] <= LOOP


def test_every_signature_is_annotated() -> None:
    assert places(Function.__args__, bare) == []


def test_every_module_stands_in_a_package_of_the_page() -> None:
    assert {package_of(path) for path in trees()} - {"__init__", "__main__"} == levels().keys()


def test_imports_run_downward() -> None:
    upward = [
        f"{path}:{line} {package_of(path)} imports {package}, which stands no lower"
        for path in trees()
        if package_of(path) in levels()
        for line, package in ours(path)
        if levels()[package] >= levels()[package_of(path)]
    ]
    assert upward == []


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("policy", {"rollout", "engines", "weights"}),
        ("rollout", {"policy"}),
        ("losses", {"types", "sizing", "run_folder", "config", "errors", "paths", "processes"}),
    ],
)
def test_packages_that_the_page_keeps_apart(package: str, never: set[str]) -> None:
    found = [(path, line, other) for path in trees() if package_of(path) == package for line, other in ours(path)]
    assert [f"{path}:{line} {package} imports {other}" for path, line, other in found if other in never] == []


def test_only_run_knows_hydra() -> None:
    knowing = {
        package_of(path) for path, tree in trees().items() for _, name in imports(tree) if name.startswith("hydra")
    }
    assert knowing == {"run"}
