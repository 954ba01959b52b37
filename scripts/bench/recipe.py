"""What a run has learnt, and how fast, or what sapo-eval has found: a folder as JSON with a table, for the docs.

    python scripts/bench/recipe.py runs/calculator/... --columns tools/call_frequency --out docs/bench/calculator.json
    python scripts/bench/recipe.py evals/... --out docs/bench/eval_1.5b.json

A row of the table is an evaluation, with the training step before it: when (seconds of the run, vLLM's start and the
model's compilation included), what the held-out rows got, and the chosen metrics of that step.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
from workloads import ROOT

sys.path.insert(0, str(ROOT))
from sapo_rl.telemetry.metrics import Record, read_metrics

CURVE = ("step", "time", "reward/mean", "completions/mean_length", "time/step")
"""Kept of every step, beside the chosen columns."""


def curve(records: list[Record], columns: list[str]) -> list[Record]:
    """Return what is kept of each training step."""
    names = [*CURVE, *columns]
    return [{name: one[name] for name in names if name in one} for one in records if "reward/mean" in one]


def table(records: list[Record], columns: list[str], note: str, chosen: Sequence[str] = ()) -> dict[str, Any]:
    """Return the evaluations as a table of texts, with the chosen numbers of them or the usual ones."""
    evaluations = [one for one in records if any(name in one for name in chosen or ["eval/reward"])]
    parts = sorted({name for one in evaluations for name in one if name.startswith("eval/rewards/")})
    scores = chosen or (parts if len(parts) > 1 else ["eval/reward"])
    steps = {one["step"]: one for one in records if "reward/mean" in one}
    rows = []
    for one in evaluations:
        step = steps.get(max(1, one["step"]), {})
        own = ["" if step.get(name) is None else f"{step[name]:.2f}" for name in columns]
        rows.append([str(one["step"]), f"{one['time']:.0f}", *(f"{one[name]:.3f}" for name in scores), *own])
    return {"columns": ["step", "seconds", *scores, *columns], "rows": rows, "note": note}


def measured(results: dict[str, Any], note: str) -> dict[str, Any]:
    """Return what sapo-eval has found as a table of texts: a row for each model and set."""
    rows = []
    for model in results["models"]:
        for name, found in model["sets"].items():
            metrics = found["metrics"]
            numbers = [f"{metrics[f'eval/{name}/mean_length']:.0f}", f"{metrics[f'eval/{name}/clipped_ratio']:.3f}"]
            for score, estimate in found["estimates"].items():
                interval = f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
                rows.append([model["model"], name, str(estimate["prompts"]), score, interval, *numbers])
    columns = ["model", "set", "prompts", "score", "value [95% interval]", "mean length", "cut"]
    return {"columns": columns, "rows": rows, "note": note}


def main() -> None:
    """Read the run and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "--scores", nargs="*", default=[], metavar="METRIC", help="of the evaluations, not the usual ones"
    )
    parser.add_argument("--columns", nargs="*", default=[], metavar="METRIC", help="shown beside the evaluations")
    parser.add_argument("--note", default="")
    parser.add_argument("--commit", help="where the run folder does not know it")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results = args.run / "results.json"
    about = json.loads((args.run / "environment.json").read_text(encoding="utf-8"))
    git = about["git"]["sapo_rl"] or {}
    facts = {
        "date": about["date"][:10],
        "device": about["device"]["device"],
        "commit": args.commit or git.get("revision", "unknown")[:7],
        "versions": {name: about["packages"][name] for name in report.PACKAGES if name in about["packages"]},
        "command": ["sapo-eval" if results.is_file() else "sapo-train", *about["command"][1:]],
    }
    if results.is_file():
        models = json.loads(results.read_text(encoding="utf-8"))
        found = {**facts, **models, "table": measured(models, args.note)}
    else:
        records = read_metrics(args.run / "metrics.jsonl")
        shown = table(records, args.columns, args.note, args.scores)
        found = {**facts, "curve": curve(records, args.columns), "table": shown}
    report.write(args.out, found)
    print(report.markdown(found["table"]))


if __name__ == "__main__":
    main()
