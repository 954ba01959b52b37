"""The object that the loop reports to, on the sinks that need no terminal and no W&B."""

from __future__ import annotations

import io
import re
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from sapo_rl.config import Config
from sapo_rl.run_folder import METRICS
from sapo_rl.telemetry import Telemetry, read_metrics, sample_metrics
from sapo_rl.telemetry.progress import Progress
from sapo_rl.telemetry.sinks.live import panel

BEFORE = [("What is 1 - 8?", "I think so"), ("What is 2 - 8?", "Two")]
AFTER = [("What is 1 - 8?", "-7"), ("What is 2 - 8?", "-6")]


def run_steps(telemetry: Telemetry, steps: range, make_group) -> None:
    """Report some steps, with an evaluation after the last, as the loop does."""
    for step in steps:
        groups = [make_group(step, [1.0, 0.0, None])]
        timing = {"time/rollout": 3.0, "time/update": 1.0, "time/step": 4.0, "perf/tokens_per_second": 1234.0}
        telemetry.log_step(step, {**sample_metrics(groups), "policy/loss": -0.0625, **timing}, groups)
    telemetry.log_eval(steps[-1], {"eval/reward": 0.875}, AFTER)


def plain_run(config: Config, folder: Path, make_group) -> None:
    """A whole run on the plain console."""
    config.logging.console = "plain"
    with Telemetry(config, folder, header={"device": "cpu"}) as telemetry:
        telemetry.log_eval(0, {"eval/reward": 0.25}, BEFORE)
        run_steps(telemetry, range(1, 5), make_group)
        telemetry.finish(complete=True, before=BEFORE)


def test_a_run_fills_its_folder(config: Config, tmp_path: Path, make_group) -> None:
    plain_run(config, tmp_path, make_group)
    records = read_metrics(tmp_path / METRICS)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 4]
    assert not any("warning" in record for record in records)
    assert records[1]["reward/mean"] == 0.5
    files = sorted(path.name for path in (tmp_path / "completions").iterdir())
    assert files == [f"step_0000{step}.parquet" for step in (1, 2, 3, 4)]
    assert pq.read_table(tmp_path / "completions" / files[1])["prompt_index"].to_pylist() == [2, 2, 2]


def test_the_plain_console_is_one_line_a_step(
    config: Config, tmp_path: Path, make_group, capsys: pytest.CaptureFixture[str]
) -> None:
    plain_run(config, tmp_path, make_group)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"run {tmp_path} | model tiny | loss sapo | device cpu"
    assert lines[1] == "eval 0/4 | reward 0.250"
    expected = "step 2/4 | reward 0.500 | eval 0.250 | loss -0.0625 | len 2.00 | cut 33% | tok/s 1.2k | 4.0s | "
    assert re.fullmatch(re.escape(expected) + r"eta [\d.]+s", lines[3])
    assert lines[6] == "eval 4/4 | reward 0.875"


def test_the_end_shows_before_and_after_and_what_was_saved(
    config: Config, tmp_path: Path, make_group, capsys: pytest.CaptureFixture[str]
) -> None:
    plain_run(config, tmp_path, make_group)
    text = capsys.readouterr().out
    end = text[text.index("Result") :]
    assert re.search(r"eval/reward\s+0\.250\s+0\.875", end)
    for (prompt, before), (_, after) in zip(BEFORE, AFTER, strict=True):
        (line,) = [line for line in end.splitlines() if prompt in line]
        assert line.index(before) < line.index(after, line.index(before) + 1)
    assert f"  {tmp_path / METRICS}\n" in end
    assert str(tmp_path / "checkpoints") not in end
    assert f"sapo-report {tmp_path}\n" in end
    program = re.search(r"next: (\S+)", end)
    assert program and shutil.which(program[1])


def test_a_stopped_run_says_how_to_go_on(
    config: Config, tmp_path: Path, make_group, capsys: pytest.CaptureFixture[str]
) -> None:
    config.logging.console = "plain"
    folder = tmp_path / "it's mine"
    for saved in (False, True):
        (folder / "checkpoints/step_2").mkdir(parents=True) if saved else folder.mkdir()
        with Telemetry(config, folder) as telemetry:
            run_steps(telemetry, range(1, 3), make_group)
            telemetry.finish(complete=False, before=[])
        (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
        _, program, argument = shlex.split(told)  # as the shell will read it
        expected = ("sapo-train", f"resume={folder}") if saved else ("sapo-report", str(folder))
        assert (Path(program).name, argument) == expected


def test_resuming_leaves_no_step_twice(config: Config, tmp_path: Path, make_group) -> None:
    with Telemetry(config, tmp_path) as telemetry:
        telemetry.log_eval(0, {"eval/reward": 0.25}, BEFORE)
        run_steps(telemetry, range(1, 4), make_group)
    with Telemetry(config, tmp_path, resume_step=2) as telemetry:
        run_steps(telemetry, range(3, 5), make_group)
    records = read_metrics(tmp_path / METRICS)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 4]
    assert not any("warning" in record for record in records)
    times = [record["time"] for record in records]
    assert times == sorted(times)


@pytest.mark.parametrize("left", [None, "", '{"step": 1, "time": 1.0}\n', '{"step": 1, "time": 1.0}\n{"step": 2, "ti'])
def test_a_resume_without_the_records_of_earlier_steps_says_so(
    config: Config, tmp_path: Path, left: str | None
) -> None:
    if left is not None:
        (tmp_path / METRICS).write_text(left)
    with Telemetry(config, tmp_path, resume_step=2):
        pass
    lost = 1 if left else 2
    (told,) = [record["warning"] for record in read_metrics(tmp_path / METRICS) if "warning" in record]
    assert told == f"{tmp_path / METRICS} has no record of {lost} of the 2 steps that were made before this resume"


def test_starting_anew_forgets_what_an_earlier_try_left(config: Config, tmp_path: Path, make_group) -> None:
    for _ in range(2):
        with Telemetry(config, tmp_path) as telemetry:
            run_steps(telemetry, range(1, 3), make_group)
    assert [record["step"] for record in read_metrics(tmp_path / METRICS)] == [1, 2, 2]


def test_warnings_and_probes_are_recorded(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.logging.console = "plain"
    with Telemetry(config, tmp_path) as telemetry:
        telemetry.warn("tau is [inert]")
        telemetry.note("vLLM is [starting]")
        telemetry.record(0, {"mismatch/probe_logp_diff": 0.001})
    first, second = read_metrics(tmp_path / METRICS)
    assert first["warning"] == "tau is [inert]"
    assert second["mismatch/probe_logp_diff"] == 0.001
    assert capsys.readouterr().out.splitlines()[1:] == ["warning: tau is [inert]", "vLLM is [starting]"]


def test_other_ranks_do_nothing(config: Config, tmp_path: Path, make_group, capsys: pytest.CaptureFixture[str]) -> None:
    config.logging.console, config.logging.wandb = "plain", "offline"
    with Telemetry(config, tmp_path, is_main=False) as telemetry:
        run_steps(telemetry, range(1, 3), make_group)
        telemetry.warn("nothing")
        telemetry.note("nothing")
        telemetry.record(1, {})
        telemetry.finish(complete=True, before=BEFORE)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_none_prints_nothing_and_close_may_be_repeated(
    config: Config, tmp_path: Path, make_group, capsys: pytest.CaptureFixture[str]
) -> None:
    with Telemetry(config, tmp_path) as telemetry:
        run_steps(telemetry, range(1, 3), make_group)
        telemetry.warn("recorded only")
        telemetry.finish(complete=True, before=BEFORE)
        telemetry.close()
        telemetry.warn("too late")
    assert capsys.readouterr().out == ""
    assert "too late" not in (tmp_path / METRICS).read_text()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_panel_fits_the_terminal(width: int) -> None:
    progress = Progress(Path("runs/quickstart/2026-01-01"), 100, {"model": "m" * 30, "device": "d" * 30})
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(panel(progress, 1.0, width))
    record = {"step": 1, "time": 1.0, "reward/mean": 0.5, "time/rollout": 3.0, "time/update": 1.0, "time/step": 5.0}
    progress.add(record)
    progress.sample = {"prompt": "p " * 400, "completion": "\x1b[2Jc\n" * 400, "reward": 1.0, "advantage": 0.1}
    console.print(panel(progress, 1.0, width))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert all(word in text for word in ("1/100", "0.500", "rollout", "other", "advantage"))
