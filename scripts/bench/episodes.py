"""Tokens a second of episodes with several turns, beside those of one turn, on the same engines of one GPU.

    python scripts/bench/episodes.py --out docs/bench/episodes.json
    python scripts/bench/episodes.py --workload tiny --model TINY --set 8:eager:1 --replies 4 --out /tmp/episodes.json

One turn is the workload's own batch. Episodes are as many games of `guess`, all under way at once, four turns each: the
model thinks aloud, up to `--replies` tokens a turn, and is told whether its number is too low or too high. It is not
trained here. Of two runs each the better one counts, after a part of one that warms up.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import report
from rollout import Set, config_of, parse_set
from workloads import MODEL, ROOT, WORKLOADS, chat_rows

sys.path.insert(0, str(ROOT))
from sapo_rl.config import Config, DataConfig, EnvironmentConfig
from sapo_rl.data import build_prompts
from sapo_rl.engines.build import build_engines, close_all, device_of, model_facts
from sapo_rl.environments.runner.pool import pools_of
from sapo_rl.policy.model import load_tokenizer, stop_tokens
from sapo_rl.rollout.collector import Rollouts, Writer
from sapo_rl.rollout.episodes import Episodes

TURNS = 4
HIGH = 10**9
"""Nobody guesses a number up to this one: every episode has all its turns."""
ASKED = (
    f"I think of a whole number from 1 to {HIGH}. Each time think aloud in a few sentences about what you know of it, "
    "then say your guess."
)
COLUMNS = ["", "tok/s", "of one turn", "seconds", "tokens", "replies' mean", "turns", "prefix hit", "forks"]


def game(args: argparse.Namespace, replies: int) -> Config:
    """Return a run that plays with replies of up to so many tokens."""
    config = config_of(args, args.set)
    config.environment = EnvironmentConfig(
        "guess", {"high": HIGH}, max_turns=TURNS, max_tokens=TURNS * (replies + 64), workers=args.workers
    )
    config.data = DataConfig(source="file", max_prompt_tokens=224)
    config.rollout.max_completion_tokens = replies
    return config


def measure(writer: Writer, prompts: list[Any], row: str) -> dict[str, Any]:
    """Return the better of two runs: seconds, the model's tokens, and where there are turns their numbers."""
    writer.write(prompts[: max(1, len(prompts) // 4)], 0)
    runs: list[dict[str, Any]] = []
    for step in (1, 2):
        start = time.perf_counter()
        samples = [sample for group in writer.write(prompts, step).groups for sample in group.samples]
        seconds, tokens = time.perf_counter() - start, sum(sample.num_trained for sample in samples)
        turns = sum(max(1, len(sample.turns)) for sample in samples)
        found = {"row": row, "seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}
        found["reply_mean"] = tokens / turns
        if samples[0].turns:
            found["turns"] = turns / len(samples)
            sent, cached = (sum(sample.info[name] for sample in samples) for name in ("sent", "cached"))
            found |= {"prefix_hit": cached / sent, "forks": sum(len(sample.rows) - 1 for sample in samples)}
        runs.append(found)
    return max(runs, key=lambda run: run["tokens_per_second"])


def compare(args: argparse.Namespace, write: Callable[[list[dict[str, Any]]], None]) -> None:
    """Start the engines once, measure one turn, then episodes for each length of replies."""
    workload, config = WORKLOADS[args.workload], config_of(args, args.set)
    longest = max((game(args, replies) for replies in args.replies), key=lambda one: one.max_sequence_tokens)
    tokenizer = load_tokenizer(config.model)
    source = DataConfig(source="file", answer_column=None, max_prompt_tokens=workload.max_prompt_tokens)
    prompts, _ = build_prompts(dict(enumerate(chat_rows(workload.prompts))), source, tokenizer)
    rows = {index: {"prompt": ASKED, "answer": str(HIGH - index)} for index in range(workload.prompts)}
    games, _ = build_prompts(rows, longest.data, tokenizer)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as stack:
        engines = build_engines(
            max(config, longest, key=lambda one: one.max_sequence_tokens),
            model_facts(config.model), device_of(0), Path(folder), stop_tokens(config.model, tokenizer), "bench",
        )  # fmt: skip
        stack.callback(close_all, engines)
        for engine in engines:
            engine.start()
        for engine in engines:
            engine.wait_ready()
        rollouts = Rollouts(engines, config.rollout, tokenizer, seed=0, reproducible=False)
        found = [measure(rollouts, prompts, "one turn")]
        write(found)
        for replies in args.replies:
            asked = game(args, replies)
            rollouts = Rollouts(engines, asked.rollout, tokenizer, seed=0, reproducible=False)
            with Episodes(rollouts, pools_of(asked), asked) as episodes:
                found.append(measure(episodes, games, f"{TURNS} turns of up to {replies}"))
            write(found)


def table(args: argparse.Namespace, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the measurements as a table of texts."""
    workload, rows = WORKLOADS[args.workload], []
    for one in found:
        own = ["", "", ""]
        if "turns" in one:
            own = [f"{one['turns']:.2f}", f"{one['prefix_hit']:.2f}", str(one["forks"])]
        rows.append(
            [
                one["row"],
                f"{one['tokens_per_second']:.0f}",
                f"{one['tokens_per_second'] / found[0]['tokens_per_second']:.2f}",
                f"{one['seconds']:.2f}",
                str(one["tokens"]),
                f"{one['reply_mean']:.0f}",
                *own,
            ]
        )
    note = (
        f"{Path(args.model).name}, {workload.samples} completions of up to {workload.max_completion_tokens} tokens, "
        f"and {workload.samples} episodes of guess; {args.set.engines} engines of {args.set.sequences} sequences."
    )
    return {"columns": COLUMNS, "rows": rows, "note": note}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="a")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--set", type=parse_set, default=Set(512, True, 2), help="SEQUENCES:graphs|eager:ENGINES")
    parser.add_argument("--replies", type=int, nargs="+", default=[128, 32, 8], help="most tokens of a turn")
    parser.add_argument("--workers", type=int, default=8, help="processes with environments")
    parser.add_argument("--memory", type=float, default=0.8, help="share of the GPU's memory for all engines")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Measure, and write what there is after each measurement."""
    args = arguments()
    args.dtype = "float32" if report.facts()["device"].startswith("CPU") else "bfloat16"

    def write(found: list[dict[str, Any]]) -> None:
        report.write(args.out, {**report.facts(), "measurements": found, "table": table(args, found)})
        print(found[-1], flush=True)

    compare(args, write)


if __name__ == "__main__":
    main()
