"""The batches: which batch is begun and finished when, and what happens when making one fails."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from sapo_rl.rollout.prefetch import Prefetcher


def batches(
    finish: Callable[[int], object],
    last: int,
    prefetch: int = 1,
    in_flight: bool = False,
    begun: list[int] | None = None,
) -> Prefetcher[int, object]:
    """Begins a batch by writing its step down, and hands the step to `finish`."""
    begun = [] if begun is None else begun
    return Prefetcher(lambda step: begun.append(step) or step, finish, last, prefetch, in_flight)


def test_without_any_ahead_a_batch_is_made_when_it_is_taken() -> None:
    made: list[int] = []
    steps = batches(made.append, last=3, prefetch=0)
    for step in (1, 2, 3):
        steps.take(step)
        assert made == list(range(1, step + 1))
        steps.ready_for_new_weights()
        steps.wait()
    assert steps.take_waited() == 0.0


def test_the_next_batch_is_made_while_the_caller_works_and_none_beyond_the_last() -> None:
    begun, made = list[int](), list[int]()
    gate = threading.Event()

    def finish(step: int) -> int:
        if step == 2:
            gate.wait(10)
        made.append(step)
        return step

    steps = batches(finish, last=3, prefetch=2, begun=begun)  # one at a time, so that one is ahead at most
    assert steps.take(1) == 1  # and 2 is on its way
    assert (begun, made) == ([1, 2], [1])
    gate.set()
    steps.ready_for_new_weights()
    assert made == [1, 2]
    assert [steps.take(2), steps.take(3)] == [2, 3]
    steps.wait()
    assert begun == made == [1, 2, 3]
    assert steps.take_waited() > 0.0
    steps.close()


@pytest.mark.parametrize("prefetch", [1, 2, 3])
def test_in_flight_as_many_are_begun_as_the_weights_may_be_old(prefetch: int) -> None:
    """Batch k may begin once the weights are those after step k - 1 - prefetch, whatever is being written then."""
    begun = list[int]()
    gates = {step: threading.Event() for step in range(1, 7)}

    def finish(step: int) -> int:
        assert gates[step].wait(10)
        return step

    steps = batches(finish, last=6, prefetch=prefetch, in_flight=True, begun=begun)
    for step in range(1, 7):
        gates[step].set()
        assert steps.take(step) == step
        assert begun == list(range(1, min(6, step + prefetch) + 1))
        steps.ready_for_new_weights()  # while the others are under way
    steps.close()


def test_wait_outlasts_all_that_is_in_flight() -> None:
    made = list[int]()
    gate = threading.Event()

    def finish(step: int) -> int:
        if step > 1:
            gate.wait(10)
        made.append(step)
        return step

    steps = batches(finish, last=9, prefetch=2, in_flight=True)
    steps.take(1)
    threading.Timer(0.05, gate.set).start()
    steps.wait()
    assert made == [1, 2, 3]
    steps.close()


@pytest.mark.parametrize("in_flight", [False, True])
def test_a_resumed_loop_starts_anywhere(in_flight: bool) -> None:
    steps = batches(lambda step: step, last=9, in_flight=in_flight)
    assert [steps.take(step) for step in (7, 8, 9)] == [7, 8, 9]
    steps.close()


@pytest.mark.parametrize("place", ["ready_for_new_weights", "wait", "take"])
def test_what_making_a_batch_raises_reaches_the_caller(place: str) -> None:
    def finish(step: int) -> int:
        if step == 2:
            raise ValueError("no batch 2")
        return step

    steps = batches(finish, last=3)
    steps.take(1)
    with pytest.raises(ValueError, match="no batch 2"):
        steps.take(2) if place == "take" else getattr(steps, place)()
    steps.close()
