"""Programs a second that the sandbox runs, and what is left of them afterwards.

    python scripts/bench/sandbox.py --out docs/bench/sandbox.json
    python scripts/bench/sandbox.py --programs 0 --hanging 0 --endless 1000 --out /tmp/sandbox.json

Programs that end by themselves, and those that compute until their second of computing is over, are run by the reward
function `code`, in groups of 16, as a run has them, on all processors that this process may use. Endless ones are ended
after a second on the clock, many at a time. Processes (orphans too), descriptors, mounts, files and memory are compared
with those after the first group.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import report

sys.path.insert(0, str(report.ROOT))
from sapo_rl.processes.sandbox import Job, Limits, run
from sapo_rl.rewards import code
from sapo_rl.rewards.registry import Completion

GROUP, AT_ONCE = 16, 64
PROGRAMS = {
    "a call of a function": ("def double(x):\n    return 2 * x", ["assert double(2) == 4"], 1.0),
    "sleeps for 0 s": ("import time\ntime.sleep(0)", ["assert True"], 1.0),
    "reads and prints": ("print(2 * int(input()))", [{"input": "3", "output": "6"}], 1.0),
    "hangs, limit of 1 s of computing": ("while True: pass", ["assert True"], 0.0),
}
"""A program, its tests, and what it earns."""
HANGS = "hangs, limit of 1 s of computing"
ENDLESS = {
    "sleeps for ever, ended after 1 s": "import time\nwhile True: time.sleep(1000)",
    "computes for ever, ended after 1 s": "while True: pass",
}
LEFT = ("processes", "descriptors", "mounts", "files", "MiB")
COLUMNS = ["program", "at once", "runs", "programs/s", "seconds", *(f"{name} left" for name in LEFT)]
_SUBREAPER = 36  # of prctl: orphans of this process become its children


def left() -> dict[str, float]:
    """Return what this process holds of LEFT; files are those in its folder for temporary ones."""
    own = psutil.Process()
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    files = len(os.listdir(tempfile.gettempdir()))
    alive = [one for one in own.children(recursive=True) if _lives(one)]
    held = (len(alive), own.num_fds(), len(mounts), files, own.memory_info().rss / 2**20)
    return dict(zip(LEFT, held, strict=True))


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def measure(name: str, runs: int) -> dict[str, Any]:
    """Run a program so often; raise where it does not end as it should."""
    some, step = (AT_ONCE, _end) if name in ENDLESS else (GROUP, _score)
    at_once = AT_ONCE if name in ENDLESS else len(os.sched_getaffinity(0))
    return {"name": name, "runs": runs, "at_once": at_once, **_repeat(lambda count: step(name, count), runs, some)}


def _repeat(step: Callable[[int], None], runs: int, some: int) -> dict[str, Any]:
    seconds, done, before = 0.0, 0, left()
    while done < runs:
        count = min(some, runs - done)
        begun = time.perf_counter()
        step(count)
        seconds += time.perf_counter() - begun
        before = before if done else left()
        done += count
    now = left()
    return {"seconds": seconds, "left": {name: now[name] - before[name] for name in LEFT}}


def _score(name: str, count: int) -> None:
    program, tests, expected = PROGRAMS[name]
    completions: list[Completion] = [f"```python\n{program}\n```"] * count
    if (found := asyncio.run(code(completions, [tests] * count, cpu_seconds=1))) != [expected] * count:
        raise RuntimeError(f"{name}: earned {found}, not {expected}")


def _end(name: str, count: int) -> None:
    async def run_all() -> None:
        limits = Limits(cpu_seconds=5, seconds=1.0)
        found = await asyncio.gather(*(run(Job(ENDLESS[name]), limits) for _ in range(count)))
        if any(one.stopped != "seconds" or one.seconds < 1 for one in found):
            raise RuntimeError(f"{name}: one was not ended for its time")

    asyncio.run(run_all())


def row(found: dict[str, Any]) -> list[str]:
    """Word a measurement."""
    numbers = [str(found["at_once"]), f"{found['runs']:,}", f"{found['runs'] / found['seconds']:.1f}"]
    rest = [f"{found['left'][name]:.1f}" if name == "MiB" else f"{found['left'][name]:.0f}" for name in LEFT]
    return [found["name"], *numbers, f"{found['seconds']:.0f}", *rest]


def main() -> None:
    """Measure each kind of program and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=1000, help="runs of each that ends by itself")
    parser.add_argument("--hanging", type=int, default=60, help="runs of the one that hangs; half a second each")
    parser.add_argument("--endless", type=int, default=1000, help="runs of each that is ended after a second")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    counts = dict.fromkeys(PROGRAMS, args.programs) | {HANGS: args.hanging} | dict.fromkeys(ENDLESS, args.endless)
    load, found = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as tempfile.tempdir:
        for name, runs in counts.items():
            if runs:
                found.append(measure(name, runs))
                print(*row(found[-1]), sep=" | ", file=sys.stderr)
    note = f"On {len(os.sched_getaffinity(0))} processors; load before it began: {load:.1f}."
    table = {"columns": COLUMNS, "rows": [row(one) for one in found], "note": note}
    report.write(args.out, {**report.facts(), "measured": found, "table": table})


if __name__ == "__main__":
    main()
