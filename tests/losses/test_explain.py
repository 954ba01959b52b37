"""The picture of the gate and the numbers printed with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sapo_rl.losses.explain import main, parse, report


def test_it_draws_and_prints_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "gate.png"
    arguments = ["tau_pos=1", "tau_neg=1.05", f"out={out}"]
    command = [sys.executable, "-m", "sapo_rl.losses.explain", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "1.763 / tau" in run.stdout and "r = 2.763" in run.stdout
    assert "tau = 8.81" in run.stdout


def test_a_narrow_gate_halves_on_both_sides() -> None:
    text = report(parse(["tau_pos=10", "tau_neg=12", "clip_low=0.1", "clip_high=0.5"]))
    assert "r = 1.176 and r = 0.8237" in text
    assert "clip_low=0.1: tau = 17.6" in text and "clip_high=0.5: tau = 3.53" in text


def test_one_side_has_its_half_weight_there_and_the_whole_on_the_other(tmp_path: Path) -> None:
    text = report(parse(["tau_pos=10", "tau_neg=12", "sides=one"]))
    assert "0.1763, r = 1.176; w(1.2) = 0.420, 1 below 1" in text
    assert "0.1469, r = 0.8531; w(0.8) = 0.305, 1 above 1" in text
    assert main(["sides=one", f"out={tmp_path / 'one.png'}"]) == 0
    assert (tmp_path / "one.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("tau=1", "tau_pos, tau_neg"),
        ("tau_pos", "cannot read"),
        ("loss=m2po", "or the batch (M2PO)"),
        ("tau_pos=one", "tau_pos must be a number"),
        ("tau_pos=0", "tau_pos must be above 0"),
        ("gate=step", "sigmoid, erf"),
        ("sides=left", "both, one"),
        ("clip_low=0", "clip_low"),
    ],
)
def test_mistakes_are_told_without_a_traceback(argument: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("out", ["", "absent/gate.png"])
def test_a_picture_that_cannot_be_written_is_named(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"out={tmp_path / out}"]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"out: '{tmp_path / out}' cannot be written: ")


def test_help_is_printed_and_nothing_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--help"]) == 0
    assert "[tau_neg=1.05]" in capsys.readouterr().out and not list(tmp_path.iterdir())
