"""What is only shown ends nothing: closed, full, abandoned or narrow outputs; files are UTF-8 in any locale."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOWS = """
import os, sys
from pathlib import Path
from sapo_rl.processes import streams
streams.outlive()
from sapo_rl.config import Config
from sapo_rl.telemetry import Telemetry
for console in ("plain", "live"):
    config, folder = Config(), Path(sys.argv[1], console)
    config.model.path, config.trainer.steps = "/models/tiny", 1
    config.logging.wandb, config.logging.console = "off", console
    folder.mkdir()
    with Telemetry(config, folder) as telemetry:
        telemetry.warn("a lone surrogate \\ud800, and \\u00e9")
        telemetry.log_eval(0, {"eval/reward": 0.5}, [("caf\\u00e9", "\\ud800")])
        telemetry.finish(complete=True, before=[("caf\\u00e9", "na\\u00efve")])
print("printed \\ud800", flush=True)
print("told \\ud800", file=sys.stderr, flush=True)
Path(sys.argv[1], "done").touch()
"""
WITHOUT = {
    "closed": '"$@" >&-',
    "all closed": '"$@" <&- >&- 2>&-',
    "full": '"$@" >/dev/full 2>/dev/full',
    "abandoned": '{ "$@" 2>&1; echo $? >status; } | true; exit $(cat status)',
    "ascii": 'PYTHONIOENCODING=ascii "$@"',
    "C locale": 'LC_ALL=C PYTHONUTF8=0 "$@"',
}


@pytest.mark.parametrize("case", WITHOUT)
def test_a_run_outlives_its_output(tmp_path: Path, case: str) -> None:
    command = [sys.executable, "-c", SHOWS, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["sh", "-c", WITHOUT[case], "sh", *command], cwd=tmp_path, env=environment, capture_output=True
    )
    assert result.returncode == 0 and (tmp_path / "done").exists(), result.stderr.decode()
    assert b"Traceback" not in result.stderr and b"Exception ignored" not in result.stderr
    for console in ("plain", "live"):
        assert b"\\ud800" in (tmp_path / console / "metrics.jsonl").read_bytes()
    if case in ("ascii", "C locale"):
        assert rb"printed \ud800" in result.stdout and rb"told \ud800" in result.stderr


def test_children_inherit_what_stands_in_for_a_closed_output(tmp_path: Path) -> None:
    child = "import sys; print('lost'); sys.exit(7)"
    code = (
        "from sapo_rl.processes import streams; streams.prepare()\n"
        f"file = open({str(tmp_path / 'metrics')!r}, 'w'); assert file.fileno() > 2\n"
        f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    closed = ["sh", "-c", '"$@" >&- 2>&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(closed, env=environment).returncode == 7
    assert (tmp_path / "metrics").read_bytes() == b""


def unspecified(tree: ast.AST) -> list[int]:
    """The lines on which text is read or written in the locale's encoding; JSON is ASCII in any."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or "encoding" in [keyword.arg for keyword in node.keywords]:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        texts = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        opens = name == "open" and (isinstance(node.func, ast.Name) or texts) and not any("b" in text for text in texts)
        written = name == "write_text" and not (node.args and ast.unparse(node.args[0]).startswith("json.dumps("))
        if opens or written or name == "read_text":
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("folder", ["sapo_rl", "scripts"])
def test_no_file_is_read_or_written_in_the_encoding_of_the_locale(folder: str) -> None:
    assert unspecified(ast.parse("open('a')\nPath().read_text()\nopen('a', 'rb')\nPath().open('w')")) == [1, 2, 4]
    files = sorted((ROOT / folder).rglob("*.py"))
    found = [f"{file}:{line}" for file in files for line in unspecified(ast.parse(file.read_text(encoding="utf-8")))]
    assert files and found == []
