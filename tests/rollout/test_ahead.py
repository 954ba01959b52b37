"""The producer: which batch is made when, and what happens when making one fails."""

from __future__ import annotations

import threading

import pytest

from sapo_rl.rollout.ahead import Producer


def test_without_overlap_a_batch_is_made_when_it_is_taken() -> None:
    made: list[int] = []
    producer = Producer(made.append, last=3, overlap=False)
    for step in (1, 2, 3):
        producer.take(step)
        assert made == list(range(1, step + 1))
        producer.wait()
    assert producer.take_waited() == 0.0


def test_with_overlap_the_next_batch_is_made_while_the_caller_works_and_none_beyond_the_last() -> None:
    made: list[int] = []
    gate = threading.Event()

    def make(step: int) -> int:
        if step == 2:
            gate.wait(10)
        made.append(step)
        return step

    producer = Producer(make, last=3, overlap=True)
    assert producer.take(1) == 1  # and 2 is on its way
    assert made == [1]
    gate.set()
    producer.wait()
    assert made == [1, 2]
    assert [producer.take(2), producer.take(3)] == [2, 3]
    producer.wait()
    assert made == [1, 2, 3]
    assert producer.take_waited() > 0.0
    producer.close()


def test_a_resumed_loop_starts_anywhere() -> None:
    producer = Producer(lambda step: step, last=9, overlap=True)
    assert [producer.take(step) for step in (7, 8, 9)] == [7, 8, 9]
    producer.close()


@pytest.mark.parametrize("place", ["wait", "take"])
def test_what_making_a_batch_raises_reaches_the_caller(place: str) -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("no batch 2")
        return step

    producer = Producer(make, last=3, overlap=True)
    producer.take(1)
    with pytest.raises(ValueError, match="no batch 2"):
        producer.wait() if place == "wait" else producer.take(2)
    producer.close()
