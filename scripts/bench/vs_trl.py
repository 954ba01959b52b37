"""sapo-train against TRL's GRPOTrainer: same model, prompts, sampling, group size, updates and completion budget.

    python scripts/bench/vs_trl.py --workload a --engines 2 --overlap --out docs/bench/vs_trl_a.json
    python scripts/bench/vs_trl.py --workload b --shape 1.5b --out docs/bench/vs_trl_b_1.5b.json
    python scripts/bench/vs_trl.py --workload c --model FOLDER --out docs/bench/vs_trl_c.json

Workload a: SmolLM2-135M-Instruct, 128 prompts x 8 completions of up to 512 tokens, which end by themselves. Workload b:
a random model of a real shape, 32 x 8, geometric lengths up to 2048 tokens. Workload c: a real model of your own on
reasoning-gym's word problems, 128 x 8, up to 512 tokens. All: 4 updates a rollout batch. TRL runs first,
each program in processes of its own; the first cycles of each are left out. Needs trl, but for --skip-trl. What is done
by then is in the JSON, also when a program fails, or --limit or SIGTERM cuts it short.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import report
import yaml
from workloads import MODEL, ROOT, SHAPES, WORKLOADS, Workload, chat_rows, make_model, problem_rows

sys.path.insert(0, str(ROOT))
from sapo_rl.run_folder import METRICS
from sapo_rl.telemetry.metrics import read_metrics

HERE = Path(__file__).resolve().parent
PHASES = ("rollout", "sync", "reward", "old_logps", "update", "other")
PEER, OURS, OVERLAPPED = "TRL", "sapo-train", "sapo-train with overlap"
PROBE = "mismatch/probe_logp_diff"
TAU_POS, TAU_NEG = 1.0, 1.05
MEAN_LENGTH = 500.0
"""Of random models' completions, in tokens; 1 in 60 then reaches workload b's limit."""


class Stopped(SystemExit):
    """The bench is to end: the program under way ends now, and what it has done is written."""


def stop_on_sigterm() -> list[int]:
    """Have the first SIGTERM raise Stopped; return a list that holds the exit code from then on."""
    codes: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        codes.append(128 + number)
        raise Stopped(*codes)

    signal.signal(signal.SIGTERM, stop)
    return codes


@dataclass(frozen=True)
class Task:
    """What both programs are given."""

    workload: Workload
    model: Path
    rows: list[dict[str, Any]]
    cycles: int
    folder: Path
    """For their files."""
    limit: float
    """Seconds that each may run; what it finished by then counts."""


def peer_arguments(task: Task, batch: int) -> dict[str, Any]:
    """Return GRPOConfig's arguments for micro-batches of `batch` padded sequences."""
    workload = task.workload
    return {
        "output_dir": str(task.folder / "trl"),
        "loss_type": "sapo",
        "sapo_temperature_pos": TAU_POS,
        "sapo_temperature_neg": TAU_NEG,
        "learning_rate": workload.learning_rate,
        "lr_scheduler_type": "constant",
        "temperature": 1.0,
        "num_generations": workload.group_size,
        "max_completion_length": workload.max_completion_tokens,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": workload.samples // workload.updates // batch,
        "steps_per_generation": workload.samples // batch,
        "max_steps": task.cycles * workload.updates,
        "shuffle_dataset": False,
        "bf16": True,
        "gradient_checkpointing": False,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.3,
        "vllm_max_model_length": workload.max_prompt_tokens + workload.max_completion_tokens,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def recipe(task: Task, engines: int | None) -> dict[str, Any]:
    """Return sapo-train's config for the same, with an engine's share of the samples as its batch size."""
    workload = task.workload
    return {
        "model": {"path": str(task.model)},
        "data": {
            "source": "file",
            "path": str(task.folder / "prompts.jsonl"),
            "answer_column": None,
            "max_prompt_tokens": workload.max_prompt_tokens,
            "shuffle": False,
        },
        "reward": {"functions": {"vowels": {"function": "workloads.vowel_share"}}},
        "rollout": {
            "batch_size": workload.samples,
            "group_size": workload.group_size,
            "max_completion_tokens": workload.max_completion_tokens,
            "max_num_seqs": -(-workload.samples // (engines or 1)),
            "verify_every": task.cycles,  # after the last cycle, whose time is taken by then
        }
        | ({"engines_per_gpu": engines} if engines else {}),
        "loss": {"name": "sapo", "tau_pos": TAU_POS, "tau_neg": TAU_NEG},
        "trainer": {
            "steps": task.cycles,
            "updates_per_rollout": workload.updates,
            "learning_rate": workload.learning_rate,
            "tokens_per_micro_batch": 16384,
        },
        "eval": {"prompts": 0},
        "checkpoint": {"every": 0, "save_final": False},
        "logging": {"console": "plain", "wandb": "off"},
    }


def environment() -> dict[str, str]:
    """Return the environment of a program that imports this checkout and `workloads`."""
    paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}


def run(command: list[str], log: Path, limit: float) -> int | None:
    """Run a program with its output in a new `log`; return its exit code, or None where it was ended.

    That is after `limit` seconds, or where the bench itself is to end.
    """
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=log.parent, env=environment(), stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait(limit)
        except (subprocess.TimeoutExpired, Stopped):
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_peer(task: Task, batches: tuple[int, ...], overrides: dict[str, Any]) -> dict[str, Any]:
    """Run TRL with the first of `batches` that does not run out of memory."""
    result: dict[str, Any] = {"cycles": [], "error": "no batch size fits"}
    for batch in batches:
        arguments = peer_arguments(task, batch) | overrides
        settings, out, log = (task.folder / f"trl_{batch}.{end}" for end in ("json", "jsonl", "log"))
        settings.write_text(
            json.dumps({"model": str(task.model), "rows": task.rows, "arguments": arguments}), encoding="utf-8"
        )
        code = run([sys.executable, str(HERE / "peer_trl.py"), str(settings), str(out)], log, task.limit)
        cycles = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
        result = {"settings": arguments, "cycles": cycles, **ended(code, log)}
        if code in (0, None) or "OutOfMemoryError" not in log.read_text(encoding="utf-8", errors="replace"):
            break
    return result


def write_recipe(task: Task, engines: int | None) -> Path:
    """Write sapo-train's config; return the file."""
    file = task.folder / "bench.yaml"
    file.write_text("# @package _global_\n" + yaml.safe_dump(recipe(task, engines)), encoding="utf-8")
    return file


def run_ours(task: Task, engines: int | None, overrides: list[str], name: str = "sapo") -> dict[str, Any]:
    """Run sapo-train in a run folder of its own, with its output in `<name>.log`, and read its cycles from there."""
    file, log, settings = write_recipe(task, engines), task.folder / f"{name}.log", recipe(task, engines)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=task.folder))
    command = [sys.executable, "-m", "sapo_rl", f"config={file}", f"run_dir={folder}", *overrides]
    code = run(command, log, task.limit)
    records = read_metrics(folder / METRICS) if (folder / METRICS).is_file() else []
    return {"settings": settings, "overrides": overrides, "cycles": our_cycles(records), **ended(code, log)}


def our_cycles(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the cycles that a metrics.jsonl tells of, in the form of `peer_trl`.

    Where batches were written while others trained, `other` has the wait for them, and the last cycles, which had
    fewer written beside them, are left out.
    """
    ahead = int(max((record.get("rollout/staleness", 0.0) for record in records), default=0.0))
    probes = {record["step"]: record[PROBE] for record in records if PROBE in record}
    cycles: list[dict[str, Any]] = []
    for record in records:
        if "time/step" not in record:
            continue
        seconds = record["time/step"]
        phases = {name: record.get(f"time/{name}", 0.0) for name in PHASES[:-1]}
        beside = phases["rollout"] + phases["reward"] if ahead else 0.0
        cycle = {
            "seconds": seconds,
            "tokens": record["perf/completion_tokens"],
            "phases": phases | {"other": seconds - sum(phases.values()) + beside},
            "peak_memory_gib": record.get("perf/peak_memory_gib"),
            "parity": probes.get(record["step"]),
        }
        cycles.append({name: value for name, value in cycle.items() if value is not None})
    return cycles[: len(cycles) - ahead]


def ended(code: int | None, log: Path) -> dict[str, Any]:
    """Return nothing where a program ended well, else what it said last."""
    if code == 0:
        return {}
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]
    return {"error": "cut short" if code is None else f"exit code {code}", "log_tail": tail}


def summary(cycles: list[dict[str, Any]], warm_up: int) -> dict[str, Any]:
    """Return the means of the cycles after the first `warm_up`; empty where none is left.

    `cycle_seconds` is their median; `peak_memory_gib` the largest.
    """
    measured = cycles[warm_up:]
    if not measured:
        return {}
    seconds = [cycle["seconds"] for cycle in measured]
    found: dict[str, Any] = {
        "cycles": len(measured),
        "cycle_seconds": statistics.median(seconds),
        "cycle_seconds_min": min(seconds),
        "cycle_seconds_max": max(seconds),
        "tokens_per_cycle": statistics.fmean(cycle["tokens"] for cycle in measured),
        "tokens_per_second": sum(cycle["tokens"] for cycle in measured) / sum(seconds),
        "phases": {name: statistics.fmean(cycle["phases"][name] for cycle in measured) for name in PHASES},
    }
    for name, reduce in (("peak_memory_gib", max), ("parity", statistics.fmean)):
        values = [cycle[name] for cycle in measured if name in cycle]
        found |= {name: reduce(values)} if values else {}
    return found


def table(programs: dict[str, dict[str, Any]], note: str) -> dict[str, Any]:
    """Return the comparison as a table of texts."""
    columns = ["", "cycle s", "tok/s", *(f"{name} s" for name in PHASES), "peak GiB", "log-prob difference"]
    rows = []
    for name, program in programs.items():
        found = program["summary"]
        if not found:
            rows.append([name, program.get("error", "no cycle measured"), *[""] * (len(columns) - 2)])
            continue
        phases = [f"{found['phases'][phase]:.2f}" for phase in PHASES]
        ends = [f"{found[key]:.{n}f}" if key in found else "" for key, n in (("peak_memory_gib", 1), ("parity", 4))]
        title = f"{name}, {found['cycles']} cycles"
        rows.append([title, f"{found['cycle_seconds']:.2f}", f"{found['tokens_per_second']:.0f}", *phases, *ends])
    speeds = {name: program["summary"].get("tokens_per_second") for name, program in programs.items()}
    peer = speeds.pop(PEER, None)
    for name, speed in speeds.items():
        if peer and speed:
            note += f" {name} makes {speed / peer:.2f} times TRL's tokens a second."
    return {"columns": columns, "rows": rows, "note": note}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="a")
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder; a shape takes its tokenizer only")
    parser.add_argument("--shape", choices=SHAPES, help="run a random model of this shape instead")
    parser.add_argument("--engines", type=int, help="rollout.engines_per_gpu of sapo-train")
    parser.add_argument("--warm-up", type=int, default=2, help="cycles left out")
    parser.add_argument("--cycles", type=int, default=4, help="cycles measured")
    parser.add_argument("--limit", type=float, default=280, help="seconds for each program")
    parser.add_argument("--skip-trl", action="store_true")
    parser.add_argument("--overlap", action="store_true", help="sapo-train once more, with rollout.mode=overlap")
    parser.add_argument("--trl", nargs="*", default=[], metavar="KEY=VALUE", help="GRPOConfig's, value in JSON")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="sapo-train's overrides")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write; logs go beside it")
    return parser.parse_args()


def prepare(args: argparse.Namespace, folder: Path, copies: int = 1) -> Task:
    """Make the model, where it is a random one, and prompts for `copies` times the workload's batch."""
    workload = WORKLOADS[args.workload]
    shape, model = args.shape or workload.shape, args.model.resolve()
    if shape:
        mean_length = min(MEAN_LENGTH, workload.max_completion_tokens / 4)
        model = make_model(SHAPES[shape], model, mean_length, folder / f"random-{shape}")
    cycles = args.warm_up + args.cycles
    rows = (problem_rows if workload.word_problems else chat_rows)(workload.prompts * cycles * copies)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")
    return Task(workload, model, rows, cycles, folder, args.limit)


def main() -> None:
    """Run both programs and write what they did, after each."""
    args = arguments()
    stopped = stop_on_sigterm()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    peer_overrides = {key: json.loads(value) for key, value in (item.split("=", 1) for item in args.trl)}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        task = prepare(args, Path(name))
        workload = task.workload
        batches = workload.peer_batches[1 if args.shape == "1.5b" else 0 :]  # the first would not fit
        note = (
            f"Workload {args.workload}, {task.model.name}: {workload.prompts} prompts x {workload.group_size}, up to "
            f"{workload.max_completion_tokens} tokens, {workload.updates} updates; {args.warm_up} cycles left out."
        )
        result: dict[str, Any] = {**report.facts(), "workload": args.workload, "model": task.model.name, "programs": {}}
        programs = [*([] if args.skip_trl else [PEER]), OURS, *([OVERLAPPED] if args.overlap else [])]
        for program in programs:
            if program == PEER:
                found = run_peer(task, batches, peer_overrides)
            else:
                mode = ["rollout.mode=overlap"] if program == OVERLAPPED else []
                found = run_ours(task, args.engines, args.set + mode, "sapo_overlap" if mode else "sapo")
            result["programs"][program] = found | {"summary": summary(found["cycles"], args.warm_up)}
            result["table"] = table(result["programs"], note)
            report.write(args.out, result)
            for log in task.folder.glob("*.log"):
                (args.out.parent / f"{args.out.stem}.{log.name}").write_bytes(log.read_bytes())
            if stopped:
                sys.exit(*stopped)
    print(report.markdown(result["table"]))


if __name__ == "__main__":
    main()
