"""The report made from metrics.jsonl alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sapo_rl.telemetry.report import labels, load, main, mean_phases


def write_run(folder: Path, accuracies: list[float], **more: float) -> Path:
    """A run with an evaluation after every step; its step k has reward k / 10 and takes 2 s."""
    folder.mkdir(parents=True)
    records: list[dict[str, float]] = []
    for step, accuracy in enumerate(accuracies):
        if step:
            times = {"time/rollout": 1.5, "time/update": 0.5, "time/step": 2.0}
            records.append({"step": step, "time": 2.0 * step, "reward/mean": step / 10, **times, **more})
        records.append({"step": step, "time": 2.0 * step, "eval/reward": accuracy})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a", [0.125, 0.75, 0.5])
    assert main([str(folder)]) == 0
    lines = {line.split("  ")[0].strip() or line: line for line in capsys.readouterr().out.splitlines()}
    assert lines["eval reward, first"].split()[-1] == "0.125"
    assert lines["eval reward, last"].split()[-1] == "0.500"
    assert lines["eval reward, best"].split()[-1] == "0.750"
    assert lines["reward, last"].split()[-1] == "0.200"
    assert lines["seconds a step"].split()[-1] == "2.00"
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_several_runs_share_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_run(tmp_path / name / "run", [0.1, 0.2]) for name in ("a", "b")]
    assert main([*map(str, folders), "--out", str(tmp_path / "new" / "two.png")]) == 0
    assert (tmp_path / "new" / "two.png").read_bytes().startswith(b"\x89PNG")
    assert "a/run" in capsys.readouterr().out
    assert not (folders[0] / "report.png").exists()


def test_the_link_to_the_latest_run_is_no_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("1", "2"):
        write_run(tmp_path / "x" / name, [0.1, 0.2])
        (tmp_path / "x" / "latest").unlink(missing_ok=True)
        (tmp_path / "x" / "latest").symlink_to(name)
        assert main([*map(str, sorted((tmp_path / "x").iterdir()))]) == 0
        assert capsys.readouterr().out.splitlines()[0].split() == ["1", "2"][: int(name)]
    assert (tmp_path / "report.png").exists()  # of two runs: none has its own picture overwritten
    assert [path.parent.name for path in tmp_path.glob("x/[12]/report.png")] == ["1"]


def test_settings_that_differ_have_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a" * 60, "b" * 60]  # together wider than a terminal
    for name, tau, rewards in zip(names, (1.0, 1.05), ({}, {"mine": {"weight": 2.0}}), strict=True):
        folder = write_run(tmp_path / name, [0.1, 0.2])
        config = {"loss": {"tau_neg": tau, "tau_pos": 1.0}, "reward": {"functions": rewards}, "resume": name}
        (folder / "config.yaml").write_text(json.dumps(config))
    (tmp_path / "refused").mkdir()
    assert main([*(str(tmp_path / name) for name in (*names, "refused")), "--out", str(tmp_path / "two.png")]) == 0
    told = capsys.readouterr()
    rows = [line.split() for line in told.out.splitlines()]
    assert rows[0] == names and ["loss.tau_neg", "1.0", "1.05"] in rows
    assert ["reward.functions.mine.weight", "-", "2.0"] in rows
    assert not [row for row in rows if row[0] in ("loss.tau_pos", "resume")]
    assert told.err.startswith("sapo-report: left out: ") and "refused" in told.err


def test_phases_are_means_over_steps(tmp_path: Path) -> None:
    assert mean_phases(load(write_run(tmp_path / "a", [0.1, 0.2, 0.3]))) == {"rollout": 1.5, "update": 0.5}


def test_overlap_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlap = {"policy/ratio_max": 1e6, "time/wait": 0.125, "time/step": 0.75}
    folder = write_run(tmp_path / "a", [0.1, 0.2, 0.3], **overlap)
    assert mean_phases(load(folder)) == {"update": 0.5, "wait": 0.125, "other": 0.125}
    assert main([str(folder)]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines() if "beside" in line] == [
        ["rollout,", "beside", "1.50s"]
    ]


def test_runs_are_named_as_shortly_as_tells_them_apart(tmp_path: Path) -> None:
    runs = [load(write_run(tmp_path / name, [0.1])) for name in ("x/1", "x/2", "y/1")]
    assert labels(runs[:2]) == ["1", "2"]
    assert labels(runs) == ["x/1", "x/2", "y/1"]


def test_a_folder_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    assert main([str(tmp_path)]) == 2
    assert "no step" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["file/two.png", "folder.png", "picture.xyz"])
def test_a_picture_that_cannot_be_written_is_named(
    tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "a", [0.1, 0.2])
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert main([str(folder), "--out", str(tmp_path / out)]) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"sapo-report: --out: '{tmp_path / out}' cannot be written: ") and told.out == ""
    assert len(told.err.splitlines()) == 1


def test_a_file_in_place_of_a_run_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_run(tmp_path / "a", [0.1]) / "metrics.jsonl"
    assert main([str(file)]) == 2
    assert f"sapo-report: no file {file}/metrics.jsonl" in capsys.readouterr().err
    file.write_bytes(b"\xff\xfe{}\n")
    assert main([str(file.parent)]) == 2
    assert f"{file}:1 is no record of a run" in capsys.readouterr().err
