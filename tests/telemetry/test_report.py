"""`sapo-report` from the command line: its table, its picture, and where its page lies."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from report_made import STEPS, step_rows, write_records, write_run, write_whole_run

from sapo_rl import run_folder
from sapo_rl.telemetry.report import page
from sapo_rl.telemetry.report.cli import main
from sapo_rl.telemetry.report.runs import differences, experiments, labels, load, load_all, mean_phases
from sapo_rl.telemetry.report.samples import files_of, thinned
from sapo_rl.telemetry.sinks.completions import write_completions


def test_a_table_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a", [0.125, 0.75, 0.5])
    assert main([str(folder)]) == 0
    lines = {line.split("  ")[0].strip() or line: line for line in capsys.readouterr().out.splitlines()}
    assert lines["eval reward, first"].split()[-1] == "0.125"
    assert lines["eval reward, last"].split()[-1] == "0.500"
    assert lines["eval reward, best"].split()[-1] == "0.750"
    assert lines["reward, last"].split()[-1] == "0.200"
    assert lines["seconds a step"].split()[-1] == "2.00"
    assert (folder / "report.html").read_bytes().startswith(b"<!doctype html>")


def test_several_runs_share_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_run(tmp_path / name / "run", [0.1, 0.2]) for name in ("a", "b")]
    assert main([*map(str, folders), "--out", str(tmp_path / "new" / "two.png")]) == 0
    assert (tmp_path / "new" / "two.png").read_bytes().startswith(b"\x89PNG")
    assert "a/run" in capsys.readouterr().out
    assert [path.name for path in folders[0].iterdir()] == ["metrics.jsonl"]


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
    assert (tmp_path / "report.html").exists()  # of two runs: none has its own page overwritten
    assert [path.parent.name for path in tmp_path.glob("x/[12]/report.html")] == ["1"]


def test_a_page_of_other_runs_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        write_run(tmp_path / name, [0.1, 0.2])
    (tmp_path / "report.html").write_text("somebody's own")
    for runs, files in (("ab", ["report-2"]), ("ba", ["report-2"]), ("bc", ["report-2", "report-3"])):
        assert main([*runs]) == 0
        assert sorted(path.stem for path in tmp_path.glob("report-*.html")) == files
    assert (tmp_path / "report.html").read_text() == "somebody's own"
    assert main(["a", "b", "--out", "report.html"]) == 0  # who names it means it
    assert "doctype" in (tmp_path / "report.html").read_text()


def test_the_runs_of_a_sweep_stand_together_in_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / name for name in ("s/10", "alone", "s/2", "t/1", "s/9")]
    for folder in folders:
        write_run(folder, [0.1])
        tau = float(folder.name) if folder.name.isdigit() else 0.0
        (folder / "config.yaml").write_text(json.dumps({"loss": {"tau_neg": tau}}))
        if folder.name != "alone":
            sweep = f"sweep {folder.parent.name}"
            (folder / "environment.json").write_text(json.dumps({"sweep": sweep}))
    assert main([*map(str, folders), "--out", str(tmp_path / "r.html")]) == 0
    title, sweeps, taus, *_ = (line.split() for line in capsys.readouterr().out.splitlines())
    assert title == ["2", "9", "10", "alone", "1"]
    assert sweeps == ["sweep", "s", "s", "s", "-", "t"]
    assert taus == ["loss.tau_neg", "2.0", "9.0", "10.0", "0.0", "1.0"]
    (folders[1] / "environment.json").write_text("broken")
    assert [run.folder.name for run in load_all(folders, print)] == ["2", "9", "10", "alone", "1"]


def test_runs_that_differ_in_their_seed_alone_are_one_experiment(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, [0.1]) for name in "abcd"]
    long = "x" * 50
    told = ((0, long), (1, long), (0, f"{long[:25]}y{long[:24]}"), (0, "z"))
    for folder, (seed, words) in zip(folders, told, strict=True):
        config = {"seed": seed, "data": {"template": words}, "logging": {"name": folder.name}}
        (folder / "config.yaml").write_text(json.dumps(config))
    differ = differences([load(folder) for folder in folders])
    assert list(differ) == ["seed", "data.template"] and experiments(differ, 4) == [0, 0, 1, 2]
    del differ["seed"]
    assert experiments(differ, 4) == [0, 1, 2, 3]


def test_a_page_holds_nothing_that_could_run(tmp_path: Path) -> None:
    folder = write_whole_run(tmp_path / "<b>&", 0, 1.0)
    page.write([load(folder)], tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    scripts = [part.partition("</script>")[0] for part in text.split("<script")[1:]]
    assert len(scripts) == text.count("</script>") == STEPS + 3 + 6  # words of steps and of evaluations
    heads = [script.partition(">")[0].rpartition(" ")[2] for script in scripts]
    assert heads == ['type="application/json"', *['type="text/plain"'] * (STEPS + 3 + 4), ""]
    assert "<title>&lt;b&gt;&amp;</title>" in text and "onerror=" not in text
    policy = text.split('Content-Security-Policy" content="')[1].partition('"')[0]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe-eval" not in policy


def test_files_from_before_a_resume_are_no_steps_of_the_run(tmp_path: Path) -> None:
    run = load(write_whole_run(tmp_path / "a", 0, 1.0))
    files = files_of(run)
    assert [(file.kind, file.step) for file in files] == [
        *(("eval", step) for step in (0, 10, 20)),
        *(("step", step) for step in range(1, STEPS + 1)),
    ]
    (tmp_path / "a/completions/notes.parquet").write_text("")
    write_completions(tmp_path / "a", 4, step_rows(5))
    again = files_of(run)
    assert [old.step for old, new in zip(files, again, strict=True) if old != new] == [4]
    size = sum(file.size for file in files)
    assert thinned(files, size) == files
    few = thinned(files, size / 4)
    assert few[0] == files[0] and few[-1] == files[-1] and 2 <= len(few) <= 6


def test_a_watched_run_is_waited_for_and_written_until_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    written: list[tuple[int, float | None]] = []
    monkeypatch.setattr(page, "write", lambda runs, out, megabytes, live: written.append((runs[0].step, live)))
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_folder.locked(folder))

        def sleep(seconds: float) -> None:
            """What the run does meanwhile."""
            assert seconds == 5.0
            steps = len(written) + 1
            records = [{"step": step, "time": 1.0, "time/step": 1.0} for step in range(1, steps + 1)]
            write_records(folder, records)
            if steps == 3:
                stack.close()

        monkeypatch.setattr("time.sleep", sleep)
        assert main([str(folder), "--watch", "5"]) == 0
    assert written == [(1, 5.0), (2, 5.0), (3, 5.0), (3, None)]
    told = capsys.readouterr()
    assert (
        told.err == f"sapo-report: waiting: no file {folder}/metrics.jsonl; a run folder with metrics.jsonl is wanted\n"
    )
    assert told.out.endswith(f"page: {folder}/report.html\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--watch", "--out", "x.png"], "--watch: is for a page; 'x.png' of --out must end in .html"),
        (["--watch", "0"], "argument --watch: is '0', must be a number of 1 or more"),
        (["--megabytes", "much"], "argument --megabytes: is 'much', must be a number of 0 or more"),
    ],
)
def test_mistakes_in_arguments_are_told(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):
        assert main([str(write_run(tmp_path / "a", [0.1])), *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


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


@pytest.mark.parametrize("out", ["file/two.png", "folder.png", "picture.xyz", "file/two.html", "folder.html"])
def test_a_picture_that_cannot_be_written_is_named(
    tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "a", [0.1, 0.2])
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.html").mkdir()
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
