"""How fast the reward function `judge` asks a server that needs a tenth of a second for each answer, whatever its load.

    python scripts/bench/judge.py --out docs/bench/judge.json

The server is an asyncio process of its own on the loopback interface, which does nothing but wait. Replies come in
groups of 8 and are scored by the pool of reward functions, as in a run. The ideal is calls / at once x 0.1 s.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import report

sys.path.insert(0, str(report.ROOT))
from sapo_rl.config import RewardConfig, RewardFunctionConfig
from sapo_rl.rewards import RewardPool
from sapo_rl.types import Group, Prompt, Row, Sample, Stop

SECONDS = 0.1
GROUP = 8
WAYS = [(1, 64, False), (1, 256, False), (2, 256, False), (1, 256, True)]
"""Workers, requests that they have under way together, and whether answers are kept on disk."""
COLUMNS = ["asked by", "calls", "at once", "seconds", "ideal", "times the ideal", "processor ms a call"]


class _Answers(asyncio.Protocol):
    """Answers every request of a connection, one after the other, after `SECONDS`."""

    def connection_made(self, transport: Any) -> None:
        self._transport, self._read = transport, b""

    def data_received(self, data: bytes) -> None:
        self._read += data
        head, end, rest = self._read.partition(b"\r\n\r\n")
        lengths = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-len")]
        if end and len(rest) >= lengths[0]:
            self._read = rest[lengths[0] :]
            asyncio.get_running_loop().call_later(SECONDS, self._answer)

    def _answer(self) -> None:
        usage = {"prompt_tokens": 200, "completion_tokens": 20, "total_tokens": 220}
        message = {"role": "assistant", "content": "It is right, but long.\n8"}
        body = json.dumps({"usage": usage, "choices": [{"index": 0, "message": message}]}).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        if not self._transport.is_closing():
            self._transport.write(head.encode() + body)


def _serve(port: Connection) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(_Answers, "127.0.0.1", 0, backlog=1024)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Give the address of the server."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/v1"
    finally:
        server.kill()
        server.join()


def groups(calls: int, first: int) -> list[Group]:
    """Return so many replies to prompts that were not asked before, 500 characters each."""
    made = []
    for index in range(first, first + calls // GROUP):
        texts = [f"{index} {place} ".ljust(500, "x") for place in range(GROUP)]
        samples = [Sample([Row([], [0])], Stop.STOP, (0, 0), text=text) for text in texts]
        made.append(Group(Prompt(index, [], "Q?", {}), samples))
    return made


def measure(workers: int, at_once: int, cached: bool, calls: int, repeats: int) -> dict[str, Any]:
    """Have replies judged; the connections are open before the clock starts."""
    name = f"{workers} process{'es' if workers > 1 else ''}{', with a cache' if cached else ''}"
    with serving() as url, tempfile.TemporaryDirectory() as folder:
        args: dict[str, Any] = {"url": url, "model": "judge", "at_once": at_once // workers}
        args |= {"cache": f"{folder}/judge.sqlite"} if cached else {}
        function = RewardFunctionConfig("judge", args=args, timeout=600)
        with RewardPool(RewardConfig(functions={"quality": function}, workers=workers)) as pool:
            pool.score(groups(2 * at_once, 0))
            seconds, busy = [], _busy()
            for repeat in range(1, repeats + 1):
                given = groups(calls, repeat * 1_000_000)
                begun = time.perf_counter()
                scored = pool.score(given).groups
                seconds.append(time.perf_counter() - begun)
                if {sample.rewards["quality"] for group in scored for sample in group.samples} != {0.8}:
                    raise RuntimeError(f"{name}: not all replies earned 0.8")
            processor = (_busy() - busy) / (repeats * calls)
    measured = {"seconds": seconds, "processor_seconds_a_call": processor, "ideal": calls / at_once * SECONDS}
    return {"name": name, "calls": calls, "at_once": at_once, **measured}


def _busy() -> float:
    """Seconds that workers have computed so far."""
    workers = [
        one
        for one in psutil.Process().children(recursive=True)
        if any("runner.worker" in word for word in one.cmdline())
    ]
    return sum(times.user + times.system for times in (one.cpu_times() for one in workers))


def row(found: dict[str, Any]) -> list[str]:
    """Word a measurement, by the median of its repeats."""
    seconds, ideal = statistics.median(found["seconds"]), found["ideal"]
    numbers = [f"{found['calls']:,}", str(found["at_once"]), f"{seconds:.2f}", f"{ideal:.2f}", f"{seconds / ideal:.2f}"]
    return [found["name"], *numbers, f"{1000 * found['processor_seconds_a_call']:.2f}"]


def main() -> None:
    """Measure each way and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2560)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    load, found = os.getloadavg()[0], []
    for way in WAYS:
        found.append(measure(*way, args.calls, args.repeats))
        print(*row(found[-1]), sep=" | ", file=sys.stderr)
    note = f"Medians of {args.repeats}, {SECONDS:g} s an answer; load before it began: {load:.1f}."
    table = {"columns": COLUMNS, "rows": [row(one) for one in found], "note": note}
    report.write(args.out, {**report.facts(), "measured": found, "table": table})


if __name__ == "__main__":
    main()
