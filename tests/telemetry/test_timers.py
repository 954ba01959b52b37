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


def test_the_device_is_waited_for_at_both_ends() -> None:
    calls: list[str] = []
    timers = Timers(lambda: calls.append("wait"))
    with timers("update"):
        calls.append("body")
    assert calls == ["wait", "body", "wait"]
