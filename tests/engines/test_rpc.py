"""One connection, several threads: who gets which answer, and what happens when the other end goes away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest
from waiting import until

from sapo_rl.engines.rpc import RpcConnection
from sapo_rl.errors import EngineError, EngineLost

Ends = tuple[RpcConnection, Connection]


def connected(timeout: float = 30.0) -> Ends:
    """A connection whose child is ready."""
    ours, theirs = Pipe()
    rpc = RpcConnection(ours, timeout)
    theirs.send([(0, "done", None)])
    rpc.ready.result(10)
    return rpc, theirs


@pytest.fixture
def ends() -> Iterator[Ends]:
    rpc, theirs = connected()
    yield rpc, theirs
    theirs.close()


def numbers(child: Connection, count: int) -> list[int]:
    """The numbers of the next calls, in their order."""
    found: list[int] = []
    while len(found) < count:
        found += [number for number, _, _ in child.recv()]
    assert len(found) == count
    return found


def lost(future: Future[Any]) -> str:
    with pytest.raises(EngineLost) as error:
        future.result(10)
    return str(error.value)


def test_each_call_gets_its_own_answer_whatever_their_order(ends: Ends) -> None:
    rpc, child = ends
    first = rpc.call("add", [1], "how")
    ((one, *asked),) = child.recv()
    assert asked == ["add", ([1], "how")]
    second = rpc.call("score", [2])
    ((two, *asked),) = child.recv()
    assert asked == ["score", ([2],)]
    child.send([(two, "done", "s")])
    assert second.result(10) == "s"
    assert not first.done()
    child.send([(one, "done", "a")])
    assert first.result(10) == "a"


def test_calls_that_belong_together_are_one_message(ends: Ends) -> None:
    rpc, child = ends
    futures = rpc.calls("add", [(i,) for i in range(500)])
    calls = child.recv()
    assert [(method, arguments) for _, method, arguments in calls] == [("add", (i,)) for i in range(500)]
    child.send([(number, "done", arguments[0]) for number, _, arguments in reversed(calls)])
    assert [future.result(10) for future in futures] == list(range(500))


def test_a_burst_that_the_child_does_not_read_is_a_few_messages(ends: Ends) -> None:
    rpc, child = ends
    large = [0] * 10**6  # more than the pipe holds: the writer waits for its reader
    blocking = rpc.call("add", large)
    assert child.poll(10)
    futures = [rpc.call("add", i) for i in range(1000)]
    messages = [child.recv()]
    while sum(map(len, messages)) < 1001:
        messages.append(child.recv())
    assert len(messages) <= 3
    assert [arguments for message in messages for _, _, arguments in message][1:] == [(i,) for i in range(1000)]
    for message in messages:
        child.send([(number, "done", number) for number, _, _ in message])
    found = [future.result(10) for future in (blocking, *futures)]
    assert len(set(found)) == 1001


def test_a_cancelled_call_is_dropped_and_what_still_comes_is_ignored(ends: Ends) -> None:
    rpc, child = ends
    given_up, other = rpc.calls("add", [(1,), (2,)])
    first, second = numbers(child, 2)
    assert given_up.cancel()
    assert child.recv() == [(first, "drop", ())]
    child.send([(first, "done", "late"), (second, "done", "mine")])
    assert other.result(10) == "mine"
    assert given_up.cancelled()
    assert not other.cancel()
    assert rpc.idle()
    assert not child.poll(0.05)


def test_a_refusal_reaches_the_call_that_was_refused(ends: Ends) -> None:
    rpc, child = ends
    refused, other = rpc.calls("add", [(1,), (2,)])
    first, second = numbers(child, 2)
    child.send([(first, "failed", "too long"), (second, "done", 1)])
    with pytest.raises(EngineError, match="too long"):
        refused.result(10)
    assert other.result(10) == 1


def test_all_open_calls_and_later_ones_learn_that_the_other_end_is_gone(ends: Ends) -> None:
    rpc, child = ends
    futures = [rpc.call("add", i) for i in range(50)]
    assert not rpc.idle()
    child.close()
    assert {lost(future) for future in futures} == {"its process died"}
    assert lost(rpc.call("add", 1)) == rpc.lost == "its process died"
    assert not rpc.idle()


def test_silence_counts_from_the_last_message_to_anybody() -> None:
    rpc, child = connected(timeout=1.0)
    waiting, begun = rpc.call("add", 1), time.monotonic()
    for _ in range(8):
        time.sleep(0.2)
        rpc.call("add", 2)
        child.send([(number, "done", None) for number, _, arguments in child.recv() if arguments == (2,)])
    assert lost(waiting) == rpc.lost == "no answer within 1 s"
    assert time.monotonic() - begun > 2.0
    child.close()


def test_a_child_may_be_silent_as_long_as_nothing_is_asked_and_while_it_starts() -> None:
    ours, child = Pipe()
    rpc = RpcConnection(ours, timeout=0.1)
    early = rpc.call("add", 1)
    time.sleep(0.4)
    child.send([(0, "done", None)])
    rpc.ready.result(10)
    child.send([(number, "done", "now") for number in numbers(child, 1)])
    assert early.result(10) == "now"
    time.sleep(0.4)
    assert not rpc.lost
    assert lost(rpc.call("add", 1)) == "no answer within 0.1 s"
    child.close()


def test_what_cannot_be_read_ends_the_connection(ends: Ends) -> None:
    rpc, child = ends
    call = rpc.call("add", 1)
    child.send_bytes(b"no pickle")
    assert "cannot be read" in lost(call)


def test_a_lost_connection_leaves_no_thread_behind() -> None:
    before = set(threading.enumerate())
    rpc, child = connected()
    child.close()
    lost(rpc.call("add", 1))
    until(lambda: set(threading.enumerate()) <= before)
