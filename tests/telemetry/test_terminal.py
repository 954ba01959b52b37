"""The live panel on a real pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
from sapo_rl.config import Config
from sapo_rl.telemetry import Telemetry, rows
from sapo_rl.types import Group, Prompt, Row, Sample, Stop

config = Config()
config.model.path, config.trainer.steps = "/models/tiny", 3
config.logging.wandb, config.logging.console = "off", sys.argv[2]
row, rewards = Row([1], [1, 2]), {"match": 1.0}
sample = Sample([row], Stop.STOP, (0, 0), text="minus seven", rewards=rewards, reward=1.0)
with Telemetry(config, Path(sys.argv[1])) as telemetry:
    for step in range(1, 4):
        metrics = {"reward/mean": step / 4, "time/rollout": 1.0, "time/step": 1.5}
        telemetry.log_step(step, metrics, [rows(step, Group(Prompt(0, [1], "What is 1 - 8?", {}), [sample]))])
    print("a library prints")
    telemetry.warn("look here")
    if len(sys.argv) > 3:
        raise KeyboardInterrupt
    telemetry.finish(complete=True, before=[])
"""


def on_a_terminal(folder: Path, *arguments: str, **environ: str) -> str:
    """Run SCRIPT on a pseudo-terminal of 90 columns and return all that it wrote there."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 90, 0, 0))
    hidden = ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")
    inherited = {key: value for key, value in os.environ.items() if key not in hidden}
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env=inherited | {"TERM": "xterm-256color"} | environ,
    )
    os.close(theirs)
    written = b""
    try:
        while data := os.read(ours, 65536):
            written += data
    except OSError:  # the other end is closed
        pass
    child.wait()
    os.close(ours)
    return written.decode()


def without_codes(text: str) -> str:
    """Drop the terminal's control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_gets_a_panel_that_is_redrawn(tmp_path: Path) -> None:
    written = on_a_terminal(tmp_path, "auto")
    text = without_codes(written)
    for wanted in ("step 1/3", "step 2/3", "step 3/3", "What is 1 - 8?", "minus seven", "rollout 1.0s", "Result"):
        assert wanted in text
    assert text.count("warning: look here") == 1
    assert text.count("a library prints") == 1
    assert "\x1b[36m" in written
    assert "\x1b[?25h" in written  # the cursor is back


def test_no_color_is_respected(tmp_path: Path) -> None:
    written = on_a_terminal(tmp_path, "auto", NO_COLOR="1")
    assert "step 3/3" in without_codes(written)
    assert not re.search(r"\x1b\[(?:[0-9;]*;)?(?:3[0-7]|38|9[0-7])(?:;[0-9;]*)?m", written)


def test_an_interrupted_run_gives_the_terminal_back(tmp_path: Path) -> None:
    written = on_a_terminal(tmp_path, "auto", "interrupt")
    assert "\x1b[?25h" in written[written.rindex("\x1b[?25l") :]
    assert "Result" not in written


@pytest.mark.parametrize("kind", ["plain", "auto"])
def test_plain_lines_where_wanted_or_where_the_terminal_is_dumb(tmp_path: Path, kind: str) -> None:
    text = on_a_terminal(tmp_path, kind, TERM="dumb" if kind == "auto" else "xterm-256color")
    lines = [line for line in without_codes(text).splitlines() if line.startswith("step ")]
    assert [line.split(" | ")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3"]
    assert "╭" not in text[: text.index("Result")]
