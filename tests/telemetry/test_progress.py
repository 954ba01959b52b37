"""What the console computes from records, and how numbers are written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_rl.telemetry.progress import BARS, Progress, beside, duration, one_line, phases, short, sparkline


def test_the_time_left_follows_the_wall_clock() -> None:
    progress = Progress(Path("run"), 10)
    assert progress.eta() is None
    progress.add({"step": 1, "time": 50.0, "time/step": 4.0})
    assert progress.eta() == 9 * 4.0
    for step in (2, 3):
        progress.add({"step": step, "time": 50.0 + 6.0 * (step - 1), "time/step": 4.0})
    assert progress.eta() == 7 * 6.0


def test_time_left_counts_from_a_resume() -> None:
    progress = Progress(Path("r"), total=10, resumed_after=2)
    for step, time in ((1, 100.0), (2, 200.0)):
        progress.add({"step": step, "time": time, "time/step": 100.0})
    assert progress.eta() is None
    progress.add({"step": 3, "time": 290.0, "time/step": 4.0})
    assert progress.eta() == 7 * 4.0
    progress.add({"step": 4, "time": 296.0, "time/step": 5.0})
    assert progress.eta() == 6 * 6.0


def test_records_go_where_they_belong() -> None:
    progress = Progress(Path("run"), 10)
    for record in (
        {"step": 0, "time": 0.0, "eval/reward": 0.25},
        {"step": 0, "time": 0.1, "warning": "w"},
        {"step": 1, "time": 1.0, "time/step": 0.9},
        {"step": 1, "time": 1.1, "mismatch/probe_logp_diff": 0.0},
        {"step": 1, "time": 1.2, "eval/reward": None},
    ):
        progress.add(record)
    assert progress.step == 1
    assert len(progress.steps) == 1
    assert len(progress.evals) == 2
    assert progress.eval_rewards == [0.25]


def test_phases_sum_to_the_step_and_leave_evaluations_out() -> None:
    record = {"step": 1, "time/step": 10.0, "time/rollout": 6.0, "time/update": 3.0, "time/eval": 99.0}
    assert phases(record) == {"rollout": 6.0, "update": 3.0, "other": 1.0}
    assert beside(record | {"time/wait": 0.0}) == {}


def test_what_was_written_beside_the_training_is_no_part_of_the_step() -> None:
    record = {"time/rollout": 6.0, "time/update": 3.0, "time/wait": 0.5, "time/step": 4.0}
    assert phases(record) == {"update": 3.0, "wait": 0.5, "other": 0.5}
    assert beside(record) == {"rollout": 6.0}


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (4.24, "4.2s"), (187.0, "3m07s"), (7500.0, "2h05m"), (3599.9, "1h00m")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (0.5313, "0.531"),
        (-0.01234, "-0.0123"),
        (1.318, "1.32"),
        (12.34, "12.3"),
        (64012.0, "64.0k"),
        (3e-5, "3.0e-05"),
    ],
)
def test_short_numbers(number: float, text: str) -> None:
    assert short(number) == text


@given(st.lists(st.floats(-1e9, 1e9), max_size=300), st.integers(1, 60))
def test_sparklines_fit_and_reach_from_the_lowest_bar_up(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(width, len(values))
    assert set(line) <= set(BARS)
    assert not values or BARS[0] in line


def test_a_rising_curve_rises() -> None:
    assert sparkline([float(value) for value in range(8)], 8) == BARS
    assert sparkline([float(value) for value in range(16)], 8) == BARS


@given(st.text(), st.integers(7, 100))
def test_one_line_is_one_printable_line(text: str, width: int) -> None:
    line = one_line(text, width)
    assert len(line) <= width
    assert all(char.isprintable() for char in line)


def test_one_line_keeps_both_ends() -> None:
    assert one_line("a" * 50 + "\n" + "b" * 50, 21) == "a" * 9 + " … " + "b" * 9
