"""Processes end with those that started them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import until

ROOT = str(Path(__file__).resolve().parents[1])
WORKER = """
import socket, time
from sapo_rl.processes.guarded import begin

socket.socket(fileno=begin()).sendall(b".")
time.sleep(60)
"""
KILLED = """
import os, signal, tempfile
from pathlib import Path
from sapo_rl.processes import scratch
from sapo_rl.processes.guarded import GuardedProcess

folders = [Path(tempfile.gettempdir(), name) for name in ("sapo-run-mine", "sapo-weights-mine")]
held = [scratch.hold(folder) for folder in folders]
worker = GuardedProcess("my_worker", {**os.environ, "TMPDIR": str(folders[0])}, None)
worker.socket.recv(1)
print(*sorted(os.listdir(tempfile.gettempdir())), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
CHILD = "import os, sys, time; from sapo_rl.processes import *; {call}; print(os.getpid(), flush=True); time.sleep(60)"


def closed_by_death(read_end: int) -> bool:
    """Wait until every process that holds the pipe's other end is gone."""
    return os.read(read_end, 1) == b""


def test_child_dies_with_a_killed_parent() -> None:
    parent_code = (
        "import subprocess, sys, os; code = sys.argv[1].replace('PARENT', str(os.getpid()));"
        "subprocess.Popen([sys.executable, '-c', code], pass_fds=[int(sys.argv[2])]).wait()"
    )
    held, holder = os.pipe()
    parent = subprocess.Popen(
        [sys.executable, "-c", parent_code, CHILD.format(call="die_with_parent(PARENT)"), str(holder)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, pass_fds=[holder],
    )  # fmt: skip
    os.close(holder)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert child != parent.pid
    os.kill(parent.pid, signal.SIGKILL)
    assert parent.wait(10) == -signal.SIGKILL
    assert closed_by_death(held)
    assert parent.stdout.read() == ""
    os.close(held)


@pytest.mark.parametrize("module", ["sapo_rl.run.rank", "sapo_rl.run.launch"])
def test_rank_or_launcher_whose_parent_is_gone_ends_before_it_imports_torch(module: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')")
    (tmp_path / "accelerate.py").write_text("raise SystemExit('imported')")
    environment = {**os.environ, "SAPO_TRAIN_PARENT": str(1 << 30), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    process = subprocess.run([sys.executable, "-m", module], env=environment, capture_output=True, timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert process.stdout + process.stderr == b""


def test_hangup_kills_the_whole_group() -> None:
    ours, theirs = socket.socketpair()
    call = f"kill_group_on_hangup({theirs.fileno()}); import subprocess; g = subprocess.Popen(['sleep', '60'])"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(call=call)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, pass_fds=[theirs.fileno()], start_new_session=True,
    )  # fmt: skip
    theirs.close()
    assert child.stdout is not None
    assert int(child.stdout.readline()) == child.pid
    ours.sendall(b"a message is not a hang-up")
    assert child.poll() is None
    ours.close()
    assert child.wait(10) == -signal.SIGKILL
    assert child.stdout.read() == ""  # the grandchild held it too


def test_what_a_killed_process_left_is_deleted_by_the_guardian_of_its_worker(tmp_path: Path) -> None:
    (tmp_path / "my_worker.py").write_text(WORKER)
    (temporary := tmp_path / "temporary").mkdir()
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "TMPDIR": str(temporary)}
    killed = subprocess.run([sys.executable, "-c", KILLED], env=environment, stdout=subprocess.PIPE, timeout=60)
    assert killed.returncode == -signal.SIGKILL and killed.stdout == b"sapo-run-mine sapo-weights-mine\n"
    until(lambda: not list(temporary.iterdir()))
