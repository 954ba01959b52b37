"""check=machine on this machine, and on ones whose parts are missing or do not fit."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from command import sapo_train

from sapo_rl import sizing
from sapo_rl.run import check_machine
from sapo_rl.run.check_machine import FAIL, NOTE, OK

SMI = """#!/bin/sh
echo "NVIDIA H100 80GB HBM3, 80000, 81559, 570.86.10"
echo "NVIDIA H100 80GB HBM3, 1024, 81559, 570.86.10"
"""


def test_a_machine_that_trains_passes_and_says_what_it_has(tmp_path: Path) -> None:
    done = sapo_train("check=machine", cwd=tmp_path, COLUMNS="300")
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in done.stdout.splitlines()]
    rows = {what: (state, text) for what, state, text in cells}
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows["torch"] == (OK, importlib.metadata.version("torch"))
    assert rows["imports"] == (OK, "torch, transformers, vLLM") and "GiB free at /dev/shm" in rows["shared memory"][1]
    assert list(tmp_path.iterdir()) == []


def test_gpus_are_listed_as_the_driver_tells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    cards = ["NVIDIA H100 80GB HBM3, 78 of 80 GiB free", "NVIDIA H100 80GB HBM3, 1 of 80 GiB free"]
    assert check_machine.gpus() == (cards, "570.86.10")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert check_machine.gpus() == ([], "")


def test_versions_that_do_not_fit_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"vllm": "0.25.1", "torch": "2.11.0+cu130", "transformers": "5.19.0"}
    monkeypatch.setattr(check_machine, "_version", installed.get)
    asked = ["torch==2.10.0", "transformers<6,>=5.5", 'torch==1.0; extra == "old"', "numpy"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    found = {one.what: one for one in check_machine.versions()}
    assert found["vLLM"][1:] == (OK, "vllm 0.25.1")
    assert found["torch"][1:] == (FAIL, "2.11.0+cu130, but vllm 0.25.1 asks for ==2.10.0")
    assert found["transformers"][1:] == (OK, "5.19.0")
    asked[0] = "torch==2.11.0+cpu"  # of another build
    assert {one.what: one for one in check_machine.versions()}["torch"][1:] == (OK, "2.11.0+cu130")
    installed.clear()
    (none,) = check_machine.versions()
    assert none.state == FAIL and "sapo-train[cpu]" in none.text


def test_a_cpu_without_bfloat16_is_told_of_where_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags, told in (("avx512f avx512_vnni", False), ("avx512f avx512_bf16", True), ("asimd bf16", True)):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : fpu {flags}\n")
        assert sizing.has_bfloat16(tmp_path / "cpuinfo") is told
    assert sizing.has_bfloat16(tmp_path / "nowhere")
    monkeypatch.setattr(check_machine, "has_bfloat16", lambda: False)
    monkeypatch.setattr(check_machine, "imports", lambda has_gpu: [])
    for cards, told in (([], [(NOTE, sizing.NO_BFLOAT16)]), (["NVIDIA H100"], [])):
        monkeypatch.setattr(check_machine, "gpus", lambda cards=cards: (cards, ""))
        assert [one[1:] for one in check_machine.findings() if one.what == "CPU"] == told


def test_what_does_not_import_fails_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = "import sys; sys.modules['transformers'] = None\n"
    light = check_machine.PROBE.replace('("torch", "transformers", "vllm")', '("transformers",)')
    monkeypatch.setattr(check_machine, "PROBE", hidden + light.replace('"torch" not in found', "False"))
    (one,) = check_machine.imports(has_gpu=False)
    assert one.state == FAIL and one.text.startswith("transformers: ModuleNotFoundError: import of transformers halted")
    _, cuda = check_machine.imports(has_gpu=True)
    assert cuda == ("CUDA", FAIL, "torch is a build for the CPU and sees no GPU: install another, or a newer driver")


def test_little_room_is_noted(tmp_path: Path) -> None:
    one = check_machine._room("disk", tmp_path / "none/yet", 1e9, "choose another")
    assert one.state == NOTE and one.text.endswith(f"GiB free at {tmp_path}: choose another")
