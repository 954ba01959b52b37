"""How long `sapo-report` takes for runs with many completions, and its page in a real Chromium.

    python scripts/bench/large_report.py --out docs/bench/large_report.json

The runs are made on the spot: steps of 64 prompts with 8 completions each, of random words out of docs/, which pack
worse than what a model writes. In the browser a filter ends when its count is there; words are looked for in all
completions, which unpacks them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report

sys.path.insert(0, str(report.ROOT))
from sapo_rl.telemetry.sinks.completions import rows, write_completions
from sapo_rl.types import Group, Prompt, Row, Sample, Stop

PROMPTS, GROUP = 64, 8
"""Of a step."""
WORDS = 150
"""Of a completion, about; its tokens are said to be a third more."""
NEEDLE = "quetzalcoatl"
"""Stands in one completion of the last step."""
REWARDS = (0.0, 0.5, 1.0)
STEPS = (20, 200)
PAGE_TIMES = {
    "curves": "until the page shows curves, s",
    "list": "then completions, s",
    "filter": "one reward alone, s",
    "words": "a word in all of them, s",
}
COLUMNS = ["completions", "on disk, MB", "sapo-report, s", "its memory, MB", "page, MB", *PAGE_TIMES.values()]
COLUMNS += ["page's memory, MB"]
HEAP = "() => performance.memory.usedJSHeapSize"


def make_run(folder: Path, steps: int) -> Path:
    """Write a run folder, the same for each number of steps."""
    draw = random.Random(steps)
    known = " ".join(path.read_text(encoding="utf-8") for path in sorted((report.ROOT / "docs").glob("*.md"))).split()

    def said(length: int, more: str = "") -> str:
        return " ".join([*draw.choices(known, k=length), more])

    folder.mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        told = []
        for number in range(PROMPTS):
            samples = []
            for sample in range(GROUP):
                length, last = draw.randint(WORDS // 2, 3 * WORDS // 2), (step, number, sample) == (steps, 0, 0)
                text, reward = said(length, NEEDLE if last else ""), draw.choice(REWARDS)
                row = Row([1], [0] * (4 * length // 3))
                earned: dict[str, float | None] = {"correct": reward}
                samples.append(Sample([row], Stop.STOP, (step, step), text=text, rewards=earned, reward=reward))
            told += rows(step, Group(Prompt(step * PROMPTS + number, [1], said(40), {"answer": str(number)}), samples))
        write_completions(folder, step, told)
        phases = {"time/rollout": 20.0, "time/update": 10.0, "time/step": 30.0}
        records.append({"step": step, "time": 30.0 * step, "reward/mean": draw.random(), **phases})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records), encoding="utf-8")
    (folder / "config.yaml").write_text("description: many completions\nseed: 0\n", encoding="utf-8")
    return folder


def page_of(folder: Path) -> dict[str, Any]:
    """Have `sapo-report` write the page of a run, as it does by default, and return what it took."""
    page = folder / "report.html"
    command = [sys.executable, "-m", "sapo_rl.telemetry.report", str(folder), "--out", str(page)]
    begun = time.perf_counter()
    child = subprocess.Popen(command, cwd=report.ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds, child.returncode = time.perf_counter() - begun, os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"sapo-report ended with exit code {child.returncode}")
    on_disk = sum(path.stat().st_size for path in (folder / "completions").glob("*.parquet"))
    found = {"seconds": seconds, "memory_mb": usage.ru_maxrss / 1024, "page_mb": page.stat().st_size / 1e6}
    return {"page": str(page), "on_disk_mb": on_disk / 1e6, **found}


@contextlib.contextmanager
def browsing() -> Iterator[Any]:
    """Give a Chromium; None where there is none, or no package playwright."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None or importlib.util.find_spec("playwright") is None:
        yield None
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--enable-precise-memory-info"]
        )
        yield browser
        browser.close()


def look_at(page: Path, steps: int, browser: Any) -> dict[str, float]:
    """Open a page and use it, a user's way; returns seconds by `PAGE_TIMES`, and what its script holds at the end."""
    tab, seconds = browser.new_page(), dict[str, float]()
    tab.set_default_timeout(300_000)

    def until(name: str, condition: str, begun: float) -> None:
        tab.wait_for_function(condition)
        seconds[name] = time.perf_counter() - begun

    begun = time.perf_counter()
    tab.goto(page.as_uri())
    until("curves", "() => document.querySelector('main[data-ready=curves] .plot .main-svg')", begun)
    begun = time.perf_counter()
    tab.click("#tab-completions")
    until("list", "() => document.querySelector('main[data-ready=completions] .list .row')", begun)
    counts = "() => / of [\\d,]+ completions/.test(document.querySelector('#count').textContent)"
    whole = steps * PROMPTS * GROUP
    begun = time.perf_counter()
    tab.get_by_label("reward from").fill("1")
    until("filter", f"{counts} && !document.querySelector('#count').textContent.startsWith('{whole:,} ')", begun)
    tab.get_by_label("reward from").fill("")
    tab.wait_for_function(f"() => document.querySelector('#count').textContent.startsWith('{whole:,} ')")
    begun = time.perf_counter()
    tab.get_by_placeholder("words of the completion").fill(NEEDLE)
    until("words", "() => document.querySelector('#count').textContent.startsWith('1 of ')", begun)
    found = {**seconds, "heap_mb": tab.evaluate(HEAP) / 1e6}
    tab.close()
    return found


def measure(steps: int, browser: Any) -> dict[str, Any]:
    """Make a run of so many steps, its page, and use that."""
    with tempfile.TemporaryDirectory() as folder:
        found = page_of(make_run(Path(folder) / "run", steps))
        page = Path(found.pop("page"))
        shown = look_at(page, steps, browser) if browser else {}
    return {"completions": steps * PROMPTS * GROUP, **found, **shown}


def row(found: dict[str, Any]) -> list[str]:
    """Word a measurement."""
    sizes = [f"{found['on_disk_mb']:.0f}", f"{found['seconds']:.1f}", f"{found['memory_mb']:.0f}"]
    shown = [f"{found[name]:.1f}" if name in found else "" for name in PAGE_TIMES]
    heap = f"{found['heap_mb']:.0f}" if "heap_mb" in found else ""
    return [f"{found['completions']:,}", *sizes, f"{found['page_mb']:.0f}", *shown, heap]


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help=f"of {PROMPTS * GROUP} completions")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    load, found = os.getloadavg()[0], []
    with browsing() as browser:
        for steps in args.steps:
            found.append(measure(steps, browser))
            print(*row(found[-1]), sep=" | ", file=sys.stderr)
    note = f"Completions of {WORDS} words on average, packed in the page; once each. Load before it began: {load:.1f}"
    note += f", after it: {os.getloadavg()[0]:.1f}."
    table = {"columns": COLUMNS, "rows": [row(one) for one in found], "note": note}
    report.write(args.out, {**report.facts(), "measured": found, "table": table})


if __name__ == "__main__":
    main()
