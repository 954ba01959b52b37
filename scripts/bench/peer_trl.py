"""TRL's GRPOTrainer on a workload, timed from outside: `python peer_trl.py SETTINGS.json CYCLES.jsonl`.

SETTINGS holds `model`, `rows` and `arguments` (GRPOConfig's). A cycle is one rollout batch with its updates; each is a
line of CYCLES when it ends, so that a run cut short leaves those it finished. Nothing of TRL's is replaced: its methods
are wrapped with clocks.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]
from trl.generation.vllm_generation import VLLMGeneration  # pyright: ignore[reportMissingImports]
from workloads import vowel_share

GIB = 2**30


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocated() -> float:
    """Return the GiB that torch holds on the GPU in this process."""
    return torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0


class Clock:
    """Seconds by phase and tokens of the present cycle."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.seconds: dict[str, float] = {}
        self.tokens = 0
        self.since: float | None = None
        self.engine_gib = 0.0
        self.parity: Callable[[], list[float]] = list

    def timed(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return `method` with its time added to `phase`."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            result = method(*args, **kwargs)
            synchronize()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
            return result

        return wrapper

    def end_cycle(self) -> None:
        """Write the cycle that ends now, if one was begun, and begin the next."""
        synchronize()
        now = time.perf_counter()
        if self.since is not None:
            cycle = now - self.since
            line = {"seconds": cycle, "tokens": self.tokens, "phases": phases(self.seconds, cycle)}
            if torch.cuda.is_available():
                line["peak_memory_gib"] = torch.cuda.max_memory_allocated() / GIB - self.engine_gib
            if found := self.parity():
                line["parity"] = found[-1]
            with self.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.since, self.seconds, self.tokens = now, {}, 0


def phases(seconds: dict[str, float], cycle: float) -> dict[str, float]:
    """Return disjoint phases: TRL syncs inside its generation, and both inside the preparation of a batch."""
    inner = {name: seconds.get(name, 0.0) for name in ("sync", "reward", "old_logps")}
    rollout = seconds.get("generate", 0.0) - inner["sync"]
    prepare = seconds.get("prepare", 0.0)
    return {
        "rollout": rollout,
        **inner,
        "update": cycle - prepare,
        "other": prepare - rollout - sum(inner.values()),
    }


def watch_engine(clock: Clock) -> None:
    """Note what vLLM allocates: in TRL it lives in the trainer's process, and the trainer's own memory is compared."""
    start = VLLMGeneration._init_vllm

    def started(self: VLLMGeneration) -> None:
        before = allocated()
        start(self)
        clock.engine_gib = allocated() - before

    VLLMGeneration._init_vllm = started


def watch(trainer: GRPOTrainer, clock: Clock) -> None:
    """Put clocks around the stages of a cycle."""
    generate, score = trainer._generate_single_turn, trainer._get_per_token_logps_and_entropies
    prepare = clock.timed("prepare", trainer._generate_and_score_completions)
    timed_score = clock.timed("old_logps", score)

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = generate(*args, **kwargs)
        clock.tokens += sum(len(ids) for ids in result[0])
        return result

    def begin(*args: Any, **kwargs: Any) -> Any:
        clock.end_cycle()
        return prepare(*args, **kwargs)

    trainer._generate_single_turn = clock.timed("generate", counted)
    trainer._calculate_rewards = clock.timed("reward", trainer._calculate_rewards)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (
        score(*args, **kwargs) if torch.is_grad_enabled() else timed_score(*args, **kwargs)
    )
    trainer._generate_and_score_completions = begin
    if trainer.use_vllm:
        trainer.vllm_generation.sync_weights = clock.timed("sync", trainer.vllm_generation.sync_weights)
    clock.parity = lambda: trainer._metrics["train"]["sampling/sampling_logp_difference/mean"]


def main() -> None:
    """Train and time."""
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    clock = Clock(Path(sys.argv[2]))
    watch_engine(clock)
    trainer = GRPOTrainer(
        model=settings["model"],
        reward_funcs=vowel_share,
        args=GRPOConfig(**settings["arguments"]),
        train_dataset=Dataset.from_list(settings["rows"]),
    )
    watch(trainer, clock)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    clock.end_cycle()


if __name__ == "__main__":
    main()
