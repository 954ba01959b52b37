"""Phases of work that a GPU has only queued."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from sapo_rl.telemetry import Timers

pytestmark = pytest.mark.gpu

CYCLES = 100_000_000
"""Some fifty milliseconds on a GPU."""


def test_device_phases_are_measured_without_a_wait() -> None:
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    timers = Timers(partial(torch.cuda.Event, enable_timing=True))
    last = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with timers("old_logps"):
            torch.cuda._sleep(CYCLES)
        with timers("update"):
            torch.cuda._sleep(3 * CYCLES)
        with timers("reward"):
            pass
        last.record()
        assert not last.query()  # all phases are over, and the GPU is still at work
    finally:
        torch.cuda.set_sync_debug_mode("default")
    taken = timers.take()
    assert taken["time/update"] / taken["time/old_logps"] == pytest.approx(3, rel=0.2)
    assert taken["time/reward"] < taken["time/old_logps"]
    assert taken["time/step"] > 0.9 * (taken["time/old_logps"] + taken["time/update"])
