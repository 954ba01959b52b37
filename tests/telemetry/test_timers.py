"""Phase timers."""

from __future__ import annotations

import time

import pytest

from sapo_rl.telemetry import Timers


def test_phases_add_up_within_the_step() -> None:
    timers = Timers()
    for _ in range(2):
        with timers("rollout"):
            time.sleep(0.01)
    with timers("update"):
        pass
    taken = timers.take()
    assert list(taken) == ["time/rollout", "time/update", "time/step"]
    assert taken["time/rollout"] >= 0.02
    assert taken["time/step"] >= taken["time/rollout"] + taken["time/update"]


def test_take_begins_anew_and_the_steps_clock_never_stops() -> None:
    timers = Timers()
    with timers("rollout"):
        time.sleep(0.01)
    timers.take()
    time.sleep(0.01)
    taken = timers.take()
    assert list(taken) == ["time/step"]
    assert taken["time/step"] >= 0.01


def test_an_evaluation_is_timed_but_is_no_part_of_the_step() -> None:
    timers = Timers()
    with timers("eval"):
        time.sleep(0.05)
    with timers("rollout"):
        pass
    taken = timers.take()
    assert taken["time/eval"] >= 0.05
    assert taken["time/step"] < taken["time/eval"]


def test_a_phase_that_raises_is_counted() -> None:
    timers = Timers()
    with pytest.raises(ValueError), timers("reward"):
        raise ValueError
    assert "time/reward" in timers.take()


class Mark:
    """A mark in the queue of a device that does nothing until it is waited for."""

    queued = 0.0
    waited = 0

    def __init__(self) -> None:
        self.position: float | None = None

    def record(self) -> None:
        self.position = Mark.queued

    def synchronize(self) -> None:
        Mark.waited += 1

    def elapsed_time(self, end_event: Mark) -> float:
        assert Mark.waited and self.position is not None and end_event.position is not None
        return end_event.position - self.position


def test_work_that_a_device_has_only_queued_counts_for_the_phase_that_queued_it() -> None:
    timers = Timers(Mark)
    for phase, milliseconds in (("old_logps", 1000.0), ("update", 5000.0), ("reward", 7000.0), ("update", 2000.0)):
        with timers(phase):
            Mark.queued += milliseconds
    assert Mark.waited == 0  # nothing waits within a step
    taken = timers.take()
    assert (taken["time/old_logps"], taken["time/update"]) == (1.0, 7.0)
    assert taken["time/reward"] < 1  # by the host's clock
    assert list(timers.take()) == ["time/step"]
