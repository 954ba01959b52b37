"""The wheel holds what the program needs outside a checkout, and the command line starts without heavy imports."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path
from subprocess import PIPE

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("command", ["sapo-train", "sapo-serve", "sapo-report", "sapo-explain"])
def test_every_command_is_a_function_without_arguments(command: str) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    function = EntryPoint(command, scripts[command], "console_scripts").load()
    inspect.signature(function).bind()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_every_config_and_the_typing_marker(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"sapo_rl/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert "sapo_rl/configs/config/quickstart.yaml" in configs
    assert configs <= names
    assert "sapo_rl/py.typed" in names
    assert {
        f"sapo_rl/telemetry/report/web/{path.name}" for path in (ROOT / "sapo_rl/telemetry/report/web").iterdir()
    } <= names


def test_wheel_holds_the_package_only(wheel: Path) -> None:
    roots = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"sapo_rl"}


def test_unpacked_wheel_composes_a_recipe_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = "import sys, sapo_rl.run.cli; print(sapo_rl.__file__, file=sys.stderr); sys.exit(sapo_rl.run.cli.main())"
    result = subprocess.run(
        [sys.executable, "-c", code, "--cfg", "job", "config=quickstart"],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert str(site) in result.stderr
    assert "SmolLM2-135M" in result.stdout


@pytest.mark.e2e
def test_an_installed_program_makes_the_model_of_quickstart_once_in_the_cache_of_the_user(
    wheel: Path, tmp_path: Path
) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "sapo_rl", "config=quickstart", "check=chat"]
    both = [
        subprocess.Popen(command, cwd=elsewhere, env=environment, stdout=PIPE, stderr=PIPE, text=True) for _ in range(2)
    ]
    ends = [(*one.communicate(timeout=300), one.returncode) for one in both]
    assert [code for _, _, code in ends] == [0, 0], ends
    assert "".join(told for _, told, _ in ends).count("sapo-train: making SmolLM2-135M-Instruct out of") == 1
    assert all("a conversation of three turns" in shown for shown, _, _ in ends)
    models = tmp_path / "cache/sapo-train/models"
    assert {path.name for path in models.iterdir()} == {"SmolLM2-135M-Instruct", ".SmolLM2-135M-Instruct.lock"}
    assert not any(elsewhere.iterdir())


def test_every_dependency_is_pinned_where_there_is_no_gpu_at_a_version_that_is_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [extra for name, extra in project["optional-dependencies"].items() if name != "gpu"]
    needed = [Requirement(text) for text in sum(extras, project["dependencies"])]
    lines = (ROOT / "scripts" / "constraints-cpu.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {one.name for one in needed} == set(pins)
    assert [str(one) for one in needed if not one.specifier.contains(pins[one.name])] == []


@pytest.mark.parametrize("module", ["sapo_rl.config", "sapo_rl.run.cli"])
def test_modules_ahead_of_the_config_import_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print(*sorted({'torch', 'transformers', 'vllm', 'datasets', 'accelerate', 'wandb'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
