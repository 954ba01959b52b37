"""What signals do to `sapo-train` and to a rank; the processes at the other end are stand-ins, or the run is."""

from __future__ import annotations

import os
import pty
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCHER = """
import subprocess, sys
from pathlib import Path
from sapo_rl.run import compose, launch, start

launch.command = lambda settings, folder: [sys.executable, "-c", sys.argv[1], str(folder)]
text = Path("mine.yaml").read_text()
try:
    start.run(compose.loads(text), text, start.Start("mine", [], {}))
except subprocess.CalledProcessError as error:
    sys.exit(error.returncode % 256)
"""
HEARING = """
import signal, sys, time
from sapo_rl import processes

processes.begin()

def hear(number, frame):
    print(signal.Signals(number).name, flush=True)
    if number == signal.SIGTERM:
        sys.exit(130)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, hear)
print("ready", flush=True)
while True:
    time.sleep(1)
"""
SLOW = """
import time
from sapo_rl import processes

print("started", flush=True)
time.sleep(1)
processes.begin()
time.sleep(60)
"""
KILLED = """
import os, signal, sys
from pathlib import Path
from sapo_rl.processes import scratch

(Path(sys.argv[1]) / "checkpoints/step_000001").mkdir(parents=True)
scratch.hold(Path(os.environ["TMPDIR"]) / "sapo-weights-mine")
os.kill(os.getpid(), signal.SIGKILL)
"""
RANK = """
import signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from sapo_rl.run import rank

rank.SIGNAL_DEBOUNCE_SECONDS = 0.3
stops = rank.Stops()
telemetry = SimpleNamespace(warn=print)
if sys.argv[1] != "building":
    stops.watch(telemetry)
try:
    print("ready", flush=True)
    while not stops.asked:
        time.sleep(0.01)
    signal.raise_signal(signal.SIGINT)
    Path("told").write_text("asked once")
    print("still writing", flush=True)
    time.sleep(1)
    signal.raise_signal(signal.SIGTERM)
except KeyboardInterrupt:
    Path("told").open("a").write(", then at once")
"""


def launcher(folder: Path, child: str, **how: object) -> subprocess.Popen[str]:
    (folder / "mine.yaml").write_text(yaml.safe_dump({"model": {"path": "model"}, "data": {"source": "arithmetic"}}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    process: subprocess.Popen[str] = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, child],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,  # type: ignore[call-overload]
    )
    return process


@pytest.mark.parametrize("nohup", [False, True])
def test_signals_to_the_launcher_alone_reach_its_child(tmp_path: Path, nohup: bool) -> None:
    ignore = (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if nohup else None
    process = launcher(tmp_path, HEARING, preexec_fn=ignore)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    numbers = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]
    for number in numbers:
        process.send_signal(number)
        if number != signal.SIGHUP or not nohup:
            assert process.stdout.readline() == f"{number.name}\n"
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


def test_an_interrupt_while_the_child_starts_ends_both_quietly(tmp_path: Path) -> None:
    process = launcher(tmp_path, SLOW)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == (-signal.SIGINT) % 256


def test_a_trainer_that_is_killed_is_told_of_and_what_it_left_is_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "my runs"
    folder.mkdir()
    _, err = (process := launcher(folder, KILLED)).communicate(timeout=120)
    assert process.returncode == (-signal.SIGKILL) % 256
    killed, going_on = err.splitlines()
    assert killed.startswith("sapo-train: process ") and "was killed by SIGKILL, by kill -9" in killed
    (made,) = (folder / "runs/mine").glob("2*")
    assert shlex.split(going_on.partition("with: ")[2])[-1] == f"resume={made.relative_to(folder)}"
    assert not list(folder.glob("sapo-weights-*"))


@pytest.mark.parametrize("moment", ["building", "training"])
def test_a_rank_finishes_its_step_once_asked_and_a_closed_terminal_does_not_end_it(tmp_path: Path, moment: str) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, moment],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=theirs,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    said = b""
    while not said.endswith(b"\n"):  # a print is several writes, and one to a closed terminal fails
        said += os.read(ours, 100)
    os.close(ours)
    assert said == b"ready\r\n"
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=120)
    assert not err, err.decode()
    assert process.returncode == 0
    told = ", then at once" if moment == "building" else "asked once, then at once"
    assert (tmp_path / "told").read_text() == told
