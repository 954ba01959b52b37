"""Programs a second that the reward function `code` runs in its sandbox, and what is left of them afterwards.

    python scripts/bench/sandbox.py --out docs/bench/sandbox.json
    python scripts/bench/sandbox.py --programs 1000 --hanging 1000 --out /tmp/sandbox.json

Programs come in groups of 16, as a run has them, on all processors that this process may use. Those that hang compute
until their second is over. Descriptors, processes and memory are compared with those after the first group.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import report

sys.path.insert(0, str(report.ROOT))
from sapo_rl.rewards import code
from sapo_rl.rewards.registry import Completion

GROUP = 16
PROGRAMS = {
    "a call of a function": ("def double(x):\n    return 2 * x", ["assert double(2) == 4"], 1.0),
    "sleeps for 0 s": ("import time\ntime.sleep(0)", ["assert True"], 1.0),
    "reads and prints": ("print(2 * int(input()))", [{"input": "3", "output": "6"}], 1.0),
    "hangs, limit of 1 s": ("while True: pass", ["assert True"], 0.0),
}
"""A program, its tests, and what it earns."""
HANGS = "hangs, limit of 1 s"
COLUMNS = ["program", "runs", "programs/s", "seconds", "processes left", "descriptors left", "MiB left"]


def left() -> tuple[int, int, int]:
    """Return how many processes this one has started that live, its descriptors, and its memory in bytes."""
    own = psutil.Process()
    return len(own.children(recursive=True)), own.num_fds(), own.memory_info().rss


def measure(name: str, runs: int) -> dict[str, Any]:
    """Run a program so often; raise where it does not earn what it should."""
    program, tests, expected = PROGRAMS[name]
    seconds, done, before = 0.0, 0, left()
    while done < runs:
        some = min(GROUP, runs - done)
        completions: list[Completion] = [f"```python\n{program}\n```"] * some
        begun = time.perf_counter()
        found = code(completions, [tests] * some, cpu_seconds=1)
        seconds += time.perf_counter() - begun
        if found != [expected] * some:
            raise RuntimeError(f"{name}: earned {found}, not {expected}")
        if not done:
            before = left()
        done += some
    processes, descriptors, memory = (now - then for now, then in zip(left(), before, strict=True))
    return {
        "name": name,
        "runs": runs,
        "seconds": seconds,
        "processes": processes,
        "descriptors": descriptors,
        "mib": memory / 2**20,
    }


def row(found: dict[str, Any]) -> list[str]:
    """Word a measurement."""
    numbers = [f"{found['runs']:,}", f"{found['runs'] / found['seconds']:.1f}", f"{found['seconds']:.0f}"]
    return [found["name"], *numbers, str(found["processes"]), str(found["descriptors"]), f"{found['mib']:.1f}"]


def main() -> None:
    """Measure each kind of program and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=1000, help="runs of each that ends by itself")
    parser.add_argument("--hanging", type=int, default=0, help="runs of the one that hangs; half a second each")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    found = []
    for name in PROGRAMS:
        if runs := args.hanging if name == HANGS else args.programs:
            found.append(measure(name, runs))
            print(*row(found[-1]), sep=" | ", file=sys.stderr)
    note = f"Groups of {GROUP} on {len(os.sched_getaffinity(0))} processors; load before it began: {load:.1f}."
    table = {"columns": COLUMNS, "rows": [row(one) for one in found], "note": note}
    report.write(args.out, {**report.facts(), "measured": found, "table": table})


if __name__ == "__main__":
    main()
