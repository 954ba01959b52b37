"""Tokens a second of vLLM on one GPU: over engines, sequences, log-probs, and with or without CUDA graphs.

    python scripts/bench/rollout.py --out docs/bench/rollout.json
    python scripts/bench/rollout.py --workload tiny --model TINY --sets 8:eager:2 --out /tmp/rollout.json    # on a CPU

A set `SEQUENCES:graphs|eager:ENGINES` starts that many engines, each with an equal share of `--memory`, and measures 1
of them, 2, ... up to all (the others idle), with and without log-probs, on the same prompts. The JSON is renewed after
each measurement; sets that `--limit` leaves no time for are missing in it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import report
from transformers import PreTrainedTokenizerBase
from workloads import MODEL, ROOT, WORKLOADS, chat_rows

sys.path.insert(0, str(ROOT))
from sapo_rl.config import Config, DataConfig, ModelConfig, RolloutConfig
from sapo_rl.data import build_prompts
from sapo_rl.engines.build import build_engines, close_all, device_of, model_facts
from sapo_rl.policy.model import load_tokenizer, stop_tokens
from sapo_rl.rollout.collector import Rollouts
from sapo_rl.types import Prompt

SETS = ("512:graphs:1", "512:graphs:4", "1024:graphs:2", "256:graphs:2", "512:eager:1")
COLUMNS = ["sequences", "graphs", "engines", "log-probs", "tok/s", "seconds", "tokens", "start s"]


class Set(NamedTuple):
    """Engines that are started together."""

    sequences: int
    """That each decodes at once."""
    graphs: bool
    engines: int


class Inputs(NamedTuple):
    """What every set is measured on."""

    prompts: list[Prompt]
    tokenizer: PreTrainedTokenizerBase
    stops: list[int]
    """Tokens that end a completion."""


def parse_set(text: str) -> Set:
    """Return the set that `SEQUENCES:graphs|eager:ENGINES` means."""
    sequences, mode, engines = text.split(":")
    if mode not in ("graphs", "eager"):
        raise argparse.ArgumentTypeError(f"'{mode}' is neither graphs nor eager")
    return Set(int(sequences), mode == "graphs", int(engines))


def config_of(args: argparse.Namespace, wanted: Set) -> Config:
    """Return what a run on that many engines would be asked for."""
    workload = WORKLOADS[args.workload]
    return Config(
        model=ModelConfig(path=str(args.model), dtype=args.dtype),
        data=DataConfig(max_prompt_tokens=workload.max_prompt_tokens),
        rollout=RolloutConfig(
            group_size=workload.group_size,
            max_completion_tokens=workload.max_completion_tokens,
            max_num_seqs=wanted.sequences,
            engines_per_gpu=str(wanted.engines),
            gpu_memory_utilization=args.memory,
            enforce_eager=not wanted.graphs,
            sleep="0",
            max_restarts=0,
        ),
    )


def measure(rollouts: Rollouts, prompts: Sequence[Prompt], step: int) -> tuple[float, int]:
    """Return seconds and completion tokens of one batch, decoding included."""
    start = time.perf_counter()
    groups = rollouts.write(prompts, step).groups
    seconds = time.perf_counter() - start
    return seconds, sum(len(sample.token_ids) for group in groups for sample in group.samples)


def run_set(args: argparse.Namespace, wanted: Set, inputs: Inputs, found: list[Any]) -> None:
    """Measure one set into `found`, the better of two runs each, and write what there is so far."""
    config, facts, device = config_of(args, wanted), model_facts(ModelConfig(path=str(args.model))), device_of(0)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, contextlib.ExitStack() as stack:
        engines = build_engines(config, facts, device, Path(folder), inputs.stops, "bench")
        stack.callback(close_all, engines)
        begun = time.perf_counter()
        for engine in engines:
            engine.start()
        for engine in engines:
            engine.wait_ready()
        about = {**wanted._asdict(), "started": wanted.engines, "start_seconds": time.perf_counter() - begun}
        for count in range(1, wanted.engines + 1):
            for logprobs in (False, True):
                asked = replace(config.rollout, logprobs=logprobs)
                rollouts = Rollouts(engines[:count], asked, inputs.tokenizer, seed=0, reproducible=False)
                if not logprobs:
                    measure(rollouts, inputs.prompts[: len(inputs.prompts) // 4], 0)  # warms the engine that is new
                runs = [measure(rollouts, inputs.prompts, step) for step in (1, 2)]
                seconds, tokens = max(runs, key=lambda run: run[1] / run[0])
                found.append(about | {"engines": count, "logprobs": logprobs} | measured(seconds, tokens))
                write(args, found)
                print(found[-1], flush=True)


def measured(seconds: float, tokens: int) -> dict[str, float]:
    """Return what is kept of one measurement."""
    return {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}


def write(args: argparse.Namespace, found: list[Any]) -> None:
    """Write all measurements so far, as JSON with a table."""
    workload = WORKLOADS[args.workload]
    rows = [
        [
            str(one["sequences"]),
            "yes" if one["graphs"] else "no",
            f"{one['engines']} of {one['started']}",
            "yes" if one["logprobs"] else "no",
            f"{one['tokens_per_second']:.0f}",
            f"{one['seconds']:.2f}",
            str(one["tokens"]),
            f"{one['start_seconds']:.0f}",
        ]
        for one in found
        if "error" not in one
    ]
    note = (
        f"{Path(args.model).name}, {workload.prompts} prompts x {workload.group_size}, up to "
        f"{workload.max_completion_tokens} tokens; the better of two runs."
    )
    table = {"columns": COLUMNS, "rows": rows, "note": note}
    report.write(args.out, {**report.facts(), "measurements": found, "table": table})


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="a")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--sets", type=parse_set, nargs="+", default=[parse_set(text) for text in SETS])
    parser.add_argument("--memory", type=float, default=0.8, help="share of the GPU's memory for all engines")
    parser.add_argument("--limit", type=float, default=480, help="seconds after which no further set is begun")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Measure all sets."""
    args = arguments()
    args.dtype = "float32" if report.facts()["device"].startswith("CPU") else "bfloat16"
    workload, model = WORKLOADS[args.workload], ModelConfig(path=str(args.model))
    tokenizer = load_tokenizer(model)
    data = DataConfig(source="file", answer_column=None, max_prompt_tokens=workload.max_prompt_tokens)
    prompts, _ = build_prompts(dict(enumerate(chat_rows(workload.prompts))), data, tokenizer)
    inputs = Inputs(prompts, tokenizer, stop_tokens(model, tokenizer))
    started, found = time.monotonic(), []
    for wanted in args.sets:
        if time.monotonic() - started > args.limit:
            break
        try:
            run_set(args, wanted, inputs, found)
        except Exception as error:  # a set that does not fit must not take the others' results with it
            found.append({**wanted._asdict(), "error": f"{type(error).__name__}: {error}"})
            write(args, found)
            print(found[-1], flush=True)


if __name__ == "__main__":
    main()
