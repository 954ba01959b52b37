"""One connection, several threads: who gets which answer, and what happens when the other end goes away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from sapo_rl.engines.rpc import RpcConnection, RpcLost, RpcTimeout
from sapo_rl.errors import EngineError


@pytest.fixture
def ends() -> Iterator[tuple[RpcConnection, Connection]]:
    ours, theirs = Pipe()
    yield RpcConnection(ours, timeout=30.0), theirs
    theirs.close()


def test_each_call_gets_its_own_answers_whatever_their_order(ends: tuple[RpcConnection, Connection]) -> None:
    rpc, child = ends
    first, second = rpc.call(), rpc.call()
    first.send("add", [1], "how")
    second.send("score", [2])
    assert child.recv() == (first.number, "add", ([1], "how"))
    assert child.recv() == (second.number, "score", ([2],))
    for number, result in ((second.number, "s"), (first.number, "a"), (first.number, "b")):
        child.send((number, "done", result))
    assert (first.answer(), first.answer(), second.answer()) == ("a", "b", "s")


def test_what_a_call_that_was_given_up_still_gets_is_dropped(ends: tuple[RpcConnection, Connection]) -> None:
    rpc, child = ends
    given_up, other = rpc.call(), rpc.call()
    given_up.end()
    child.send((given_up.number, "part", "late"))
    child.send((other.number, "done", "mine"))
    assert other.answer() == "mine"


def test_a_refusal_reaches_the_call_that_was_refused(ends: tuple[RpcConnection, Connection]) -> None:
    rpc, child = ends
    refused, other = rpc.call(), rpc.call()
    child.send((refused.number, "failed", "too long"))
    child.send((other.number, "done", 1))
    with pytest.raises(EngineError, match="too long"):
        refused.answer()
    assert other.answer() == 1


def test_all_that_wait_learn_at_once_that_the_other_end_is_gone(ends: tuple[RpcConnection, Connection]) -> None:
    rpc, child = ends
    calls = [rpc.call() for _ in range(50)]

    def wait(index: int) -> str:
        try:
            calls[index].answer()
        except RpcLost as lost:
            return str(lost)
        finally:
            calls[index].end()
        return "answered"

    with ThreadPoolExecutor(len(calls)) as pool:
        found = [pool.submit(wait, index) for index in range(len(calls))]
        start = time.monotonic()
        child.close()
        assert {future.result() for future in found} == {"its process died"}
    assert time.monotonic() - start < 10.0  # of the 30 s that it may be silent
    with pytest.raises(RpcLost, match="its process died"):
        rpc.call()
    assert not rpc.idle()


def test_silence_counts_from_the_last_message_to_anybody(ends: tuple[RpcConnection, Connection]) -> None:
    rpc, child = ends
    waiting, other = rpc.call(), rpc.call()

    def talk() -> None:
        for _ in range(8):
            time.sleep(0.05)
            child.send((other.number, "part", None))

    talking = threading.Thread(target=talk)
    talking.start()
    start = time.monotonic()
    with pytest.raises(RpcTimeout, match=r"no answer within 0.2 s"):
        waiting.answer(timeout=0.2)
    assert time.monotonic() - start > 0.5
    talking.join()


def test_what_cannot_be_read_ends_the_connection(ends: tuple[RpcConnection, Connection]) -> None:
    rpc, child = ends
    call = rpc.call()
    child.send_bytes(b"no pickle")
    with pytest.raises(RpcLost, match="cannot be read"):
        call.answer()
