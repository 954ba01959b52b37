"""Seconds that the trainer's weights take into vLLM: over model sizes, transports and engines on one GPU.

    python scripts/bench/sync.py --out docs/bench/sync.json
    python scripts/bench/sync.py --models tiny --engines 1 --out /tmp/sync.json     # on a CPU: transport `file` only

Every push carries other weights; afterwards vLLM's log-probabilities must agree with the trainer's. `round trip` is a
push without a weight: two messages to vLLM. `buckets` is `ipc` through a buffer of `--buffer` GiB, with the copy for
restarts, `bare` the same without that copy. `copy` is the cast into shared memory on the GPU. `sleep` is
an engine that frees cache and weights (level 2), and the push that wakes it up. `in place` and `general` are vLLM's two
ways of loading the same tensors, without a message. The JSON is renewed after each measurement; what fails is in it
with its error, what `--limit` leaves no time for is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import report
import torch
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM
from workloads import ROOT, SHAPES, Shape

sys.path.insert(0, str(ROOT))
from sapo_rl.engines.base import EngineSettings
from sapo_rl.engines.process import LocalEngine
from sapo_rl.weights.base import WeightTransport
from sapo_rl.weights.buckets import BucketTransport
from sapo_rl.weights.file import FileTransport, weights_folder
from sapo_rl.weights.ipc import IpcTransport

MODELS = {"135m": Shape(576, 1536, 30, 9, 3, 49152)} | SHAPES
PROBE = list(range(100, 164))
COLUMNS = ["model", "engines", "transport", "first (ms)", "then (ms)", "disagreement (nats)"]


def make_folder(name: str, parent: Path, device: str) -> Path:
    """Write a random model of this shape, without a tokenizer."""
    config = MODELS[name].config(max_position_embeddings=2048)
    with torch.device(device):
        model: Any = Qwen2ForCausalLM(config)
    model.bfloat16().save_pretrained(parent / name)
    return parent / name


def settings(args: argparse.Namespace, model: Path, log: Path, engines: int, sleep_level: int = 0) -> EngineSettings:
    """Return the settings of an engine that starts quickly: no graphs, a small cache; a core process as in a run."""
    return EngineSettings(
        model=str(model),
        dtype=args.dtype,
        max_model_len=256,
        max_num_seqs=64,
        gpu_memory_utilization=0.1,
        cpu_kv_cache_gb=0.1,
        enforce_eager=True,
        stop_token_ids=[0],
        seed=0,
        device=args.device,
        trust_remote_code=False,
        revision=None,
        start_timeout=180.0,
        timeout=60.0,
        max_restarts=0,
        log_path=log,
        kv_cache_bytes=2**30,
        sleep_level=sleep_level,
        core_process=args.device != "cpu" and engines == 1,
    )


@contextlib.contextmanager
def started(settings: Sequence[EngineSettings]) -> Any:
    """Start engines one after the other; close them in the end."""
    with contextlib.ExitStack() as stack:
        engines = [LocalEngine(one) for one in settings]
        for engine in engines:
            stack.callback(engine.close)
            engine.start()
            engine.wait_ready()
        yield engines


class Trainer:
    """Float32 weights that change before every push, and what they make of the probe."""

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device)
        self.half = dtype == "bfloat16"
        self.version = 0

    @torch.no_grad()
    def change(self) -> int:
        """Turn every weight round: the model is another one, and the one before after two changes."""
        self.version += 1
        for weight in self.model.parameters():
            weight.copy_(weight.flip(0))
        return self.version

    @torch.no_grad()
    def disagreement(self, engine: LocalEngine) -> float:
        """Return the mean |difference| of the log-probabilities of the probe."""
        ids = torch.tensor([PROBE], device=self.model.device)
        with torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.half):
            logits = self.model(ids).logits[0, :-1].float()
        expected = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
        found = engine.score(PROBE)
        return statistics.fmean(abs(a - b) for a, b in zip(found, expected, strict=True))


def timed(action: Callable[[], object]) -> float:
    """Return the milliseconds of one call, device work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def pushes(
    transport: WeightTransport, trainer: Trainer, engines: Sequence[LocalEngine], count: int
) -> dict[str, float | list[float]]:
    """Push changed weights `count` times; return milliseconds and the engines' worst disagreement afterwards."""
    times = []
    for _ in range(count):
        version = trainer.change()
        times.append(timed(lambda: transport.push(trainer.model.named_parameters(), engines, version)))  # noqa: B023
    worst = max(trainer.disagreement(engine) for engine in engines)
    return {"first": times[0], "then": statistics.median(times[1:]), "all": times, "disagreement": worst}


def bucketed(dtype: torch.dtype, size: int, buffer: float, keep: bool) -> BucketTransport:
    """Return the transport through a buffer of `buffer` GiB, for weights of `size` bytes."""
    return BucketTransport(IpcTransport(dtype), FileTransport(weights_folder(size), dtype), int(buffer * 2**29), keep)


def measure_pushes(args: argparse.Namespace, model: Path, count: int, folder: Path, found: dict[str, Any]) -> None:
    """Measure both transports into `count` engines, and the parts of `ipc`."""
    trainer, dtype = Trainer(model, args.device, args.dtype), getattr(torch, args.dtype)
    size = sum(weight.numel() for weight in trainer.model.parameters()) * dtype.itemsize
    found["megabytes"] = size / 2**20
    with contextlib.ExitStack() as stack:
        memory = IpcTransport(dtype)
        stack.callback(memory.close)
        small: dict[str, WeightTransport[Any]] = {}
        if args.device != "cpu":
            small = {kind: bucketed(dtype, size, args.buffer, kind == "buckets") for kind in ("buckets", "bare")}
        for transport in small.values():
            stack.callback(transport.close)
        logs = [folder / f"{model.name}_{count}_{i}.log" for i in range(count)]
        engines = stack.enter_context(started([settings(args, model, log, count) for log in logs]))
        if args.device != "cpu":
            found["ipc"] = pushes(memory, trainer, engines, 12)
            for kind, transport in small.items():
                found[kind] = pushes(transport, trainer, engines, 6)
            found["copy"] = [timed(lambda: memory.fill(trainer.model.named_parameters())) for _ in range(5)]
            empty = json.dumps({"kind": "gpu", "dtype": args.dtype, "blocks": [], "tensors": []})
            found["round trip"] = [timed(lambda: engines[0].load_weights(empty, 0)) for _ in range(10)]
        file = FileTransport(weights_folder(size), dtype)
        stack.callback(file.close)
        found["file"] = pushes(file, trainer, engines, 4)


def measure_sleep(args: argparse.Namespace, model: Path, folder: Path, found: dict[str, Any]) -> None:
    """Measure what sleep at level 2 frees and takes, and the push that ends it."""
    trainer = Trainer(model, args.device, args.dtype)
    with contextlib.ExitStack() as stack:
        transport = IpcTransport(getattr(torch, args.dtype))
        stack.callback(transport.close)
        (engine,) = stack.enter_context(started([settings(args, model, folder / f"{model.name}_sleep.log", 1, 2)]))
        for _ in range(3):
            before = torch.cuda.mem_get_info()[0]
            found.setdefault("sleep", []).append(timed(engine.sleep))
            found.setdefault("freed_megabytes", []).append((torch.cuda.mem_get_info()[0] - before) / 2**20)
            pushed = pushes(transport, trainer, [engine], 2)
            found.setdefault("wake and push", []).append(pushed["first"])
            found["disagreement"] = pushed["disagreement"]


def inside(folder: Path, dtype: Any) -> None:
    """Print as JSON what vLLM's two ways of loading take in its own process, in milliseconds."""
    from vllm import LLM

    from sapo_rl.engines.vllm.worker import keeps_checkpoint_format

    llm = LLM(
        str(folder), dtype=dtype, enforce_eager=True, skip_tokenizer_init=True, max_model_len=256,
        gpu_memory_utilization=0.1, kv_cache_memory_bytes=2**28,
    )  # fmt: skip
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    weights = [
        (name, tensor.to(runner.device))
        for name, tensor in AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).named_parameters()
    ]
    general = lambda: runner.reload_weights(weights_iterator=iter(weights), is_checkpoint_format=True)  # noqa: E731
    result = {
        "tensors": len(weights),
        "keeps_checkpoint_format": keeps_checkpoint_format(runner.get_model()),
        "general": [timed(general) for _ in range(4)],
    }
    if runner.device.type == "cuda":
        result["in place"] = [timed(lambda: runner.get_model().load_weights(iter(weights))) for _ in range(6)]
    print("RESULT " + json.dumps(result), flush=True)


def measure_inside(args: argparse.Namespace, model: Path, found: dict[str, Any]) -> None:
    """Run `inside` in a process of its own, for at most 150 s."""
    command = [sys.executable, __file__, "--inside", str(model), "--dtype", args.dtype, "--out", os.devnull]
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    told = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150)
    lines = [line for line in told.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(told.stderr[-1500:])
    found |= json.loads(lines[-1].removeprefix("RESULT "))


def table(measurements: dict[str, Any]) -> dict[str, Any]:
    """Return the pushes as a table for the docs."""
    rows = [
        [name, str(count), kind, f"{one['first']:.0f}", f"{one['then']:.1f}", f"{one['disagreement']:.3f}"]
        for name, cases in measurements.items()
        for count in ("1", "2")
        for kind in ("ipc", "buckets", "bare", "file")
        if (one := cases.get(f"{count} engines", {}).get(kind))
    ]
    return {"columns": COLUMNS, "rows": rows, "note": "All in: cast, transfer, load, prefix cache reset; median."}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["0.5b", "1.5b", "135m"])
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--limit", type=float, default=480, help="seconds after which nothing further is begun")
    parser.add_argument("--buffer", type=float, default=1.0, help="GiB; half of it holds the largest weight")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Measure everything."""
    args = arguments()
    if args.inside:
        return inside(args.inside, args.dtype)
    args.device = "cuda:0" if torch.cuda.is_available() else "cpu"
    start, measurements = time.monotonic(), dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        for name in args.models:
            model, cases = make_folder(name, folder, args.device), measurements.setdefault(name, {})
            parts: dict[str, Callable[[dict[str, Any]], None]] = {
                f"{count} engines": lambda found, count=count, model=model: measure_pushes(
                    args, model, count, folder, found
                )
                for count in args.engines
            }
            parts["inside"] = lambda found, model=model: measure_inside(args, model, found)
            if args.device != "cpu":
                parts["sleep"] = lambda found, model=model: measure_sleep(args, model, folder, found)
            for part, action in parts.items():
                if time.monotonic() - start > args.limit:
                    continue
                found = cases.setdefault(part, {})
                began, clock = time.monotonic(), time.time()
                try:
                    action(found)
                except Exception as error:  # the other measurements are still worth having
                    found["error"] = f"{type(error).__name__}: {error}"[-2000:]
                    logs = [log for log in folder.glob("*.log") if log.stat().st_mtime > clock]
                    found["logs"] = {log.name: log.read_text(encoding="utf-8")[-4000:] for log in logs}
                found["seconds"] = time.monotonic() - began
                report.write(args.out, {**report.facts(), "measurements": measurements, "table": table(measurements)})
                print(name, part, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
