"""sapo-train on more and more GPUs, with the same work for each: what a second GPU is worth.

    python scripts/bench/scaling.py --gpus 1 2 4 --launch ddp --out docs/bench/scaling_ddp.json
    python scripts/bench/scaling.py --gpus 4 --launch fsdp2 --shape 7b --workload 7b --out docs/bench/scaling_7b.json
    python scripts/bench/scaling.py --gpus 1 --serve 1 --out docs/bench/serving.json

Workload b of the comparison with TRL, its rollout batch once for every GPU. With `--serve N` rollout servers have the N
GPUs after those that train. Efficiency is tokens a second for each GPU that trains, of those of the first run.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import report
from vs_trl import PHASES, Task, environment, prepare, run_ours, stop_on_sigterm, summary, write_recipe
from workloads import MODEL, SHAPES, WORKLOADS

START_SECONDS = 600.0
"""In which a server must listen."""
END_SECONDS = 30.0
"""For a server to end by itself; then it is killed, and its children with it."""


@contextmanager
def serving(task: Task, first: int, count: int, overrides: list[str]) -> Iterator[list[str]]:
    """Run `count` rollout servers on the GPUs from number `first` on; yields the overrides that use them.

    Raises:
        RuntimeError: a server ended, or did not listen in time; with the end of its log.
    """
    recipe = f"config={write_recipe(task, None)}"
    ports = free_ports(count)
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for index, port in enumerate(ports):
            own = environment() | {"CUDA_VISIBLE_DEVICES": str(first + index)}
            command = [sys.executable, "-m", "sapo_rl.run.serve", recipe, *overrides, "--port", str(port)]
            with (task.folder / f"server_{index}.log").open("w", encoding="utf-8") as log:
                servers.append(subprocess.Popen(command, cwd=task.folder, env=own, stdout=log, stderr=log))
        deadline = time.monotonic() + START_SECONDS
        for index, (server, port) in enumerate(zip(servers, ports, strict=True)):
            while not listens(port):
                if server.poll() is not None or time.monotonic() > deadline:
                    said = (task.folder / f"server_{index}.log").read_text(encoding="utf-8", errors="replace")[-2000:]
                    raise RuntimeError(f"server {index} does not listen:\n{said}")
                time.sleep(0.5)
        yield [f"rollout.servers=[{','.join(f'127.0.0.1:{port}' for port in ports)}]"] if count else []
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            try:
                server.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nobody listens on."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def listens(port: int) -> bool:
    """Return whether somebody does on that port of this machine."""
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


def measure(task: Task, gpus: int, launch: str, engines: int | None, overrides: list[str]) -> dict[str, Any]:
    """Run the recipe on `gpus` ranks; each has the workload's batch."""
    whole = [
        f"launch={launch if gpus > 1 else 'single'}",
        f"launch.num_processes={gpus}",
        f"rollout.batch_size={task.workload.samples * gpus}",
    ]
    return {"gpus": gpus, "launch": launch, **run_ours(task, engines, whole + overrides)}


def table(runs: list[dict[str, Any]], note: str) -> dict[str, Any]:
    """Return the runs as a table of texts."""
    columns = ["GPUs", "launch", "cycle s", "tok/s", "efficiency", *(f"{name} s" for name in PHASES), "peak GiB"]
    rows = []
    base = next((one["summary"]["tokens_per_second"] / one["gpus"] for one in runs if one["summary"]), 0.0)
    for one in runs:
        found, start = one["summary"], [str(one["gpus"]), one["launch"]]
        if not found:
            rows.append([*start, one.get("error", "no cycle measured"), *[""] * (len(columns) - 3)])
            continue
        rows.append(
            [
                *start,
                f"{found['cycle_seconds']:.2f}",
                f"{found['tokens_per_second']:.0f}",
                f"{found['tokens_per_second'] / one['gpus'] / base:.0%}",
                *(f"{found['phases'][phase]:.2f}" for phase in PHASES),
                f"{found['peak_memory_gib']:.1f}",
            ]
        )
    return {"columns": columns, "rows": rows, "note": note}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="numbers of GPUs, one run each")
    parser.add_argument("--launch", default="ddp", help="launch profile where there are several")
    parser.add_argument("--workload", choices=WORKLOADS, default="b")
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder; a shape takes its tokenizer only")
    parser.add_argument("--shape", choices=SHAPES, help="random model of another shape than the workload's")
    parser.add_argument("--serve", type=int, default=0, metavar="N", help="GPUs with a rollout server each")
    parser.add_argument("--engines", type=int, help="rollout.engines_per_gpu")
    parser.add_argument("--warm-up", type=int, default=2, help="cycles left out")
    parser.add_argument("--cycles", type=int, default=3, help="cycles measured")
    parser.add_argument("--limit", type=float, default=280, help="seconds for each run")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write; logs go beside it")
    return parser.parse_args()


def main() -> None:
    """Measure every number of GPUs and write what was found, after each."""
    args = arguments()
    stopped = stop_on_sigterm()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {**report.facts(), "workload": args.workload, "runs": []}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        task = prepare(args, Path(name), copies=max(args.gpus))
        workload = task.workload
        note = (
            f"{task.model.name}: {workload.prompts} prompts x {workload.group_size} for each GPU, up to "
            f"{workload.max_completion_tokens} tokens, {workload.updates} updates; {args.warm_up} cycles left out."
        )
        note += f" {args.serve} more serve." if args.serve else ""
        for gpus in args.gpus:
            with serving(task, gpus, args.serve, args.set) as servers:
                found = measure(task, gpus, args.launch, args.engines, servers + args.set)
            result["runs"].append(found | {"summary": summary(found["cycles"], args.warm_up)})
            result["table"] = table(result["runs"], note)
            report.write(args.out, result)
            log = task.folder / "sapo.log"
            (args.out.parent / f"{args.out.stem}.{gpus}.log").write_bytes(log.read_bytes())
            if stopped:
                sys.exit(*stopped)
    print(report.markdown(result["table"]))


if __name__ == "__main__":
    main()
