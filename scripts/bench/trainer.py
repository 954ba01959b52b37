"""Tokens a second, MFU and peak memory of the trainer's update, for each thing that it could do otherwise.

    python scripts/bench/trainer.py --out docs/bench/trainer.json --limit 540
    python scripts/bench/trainer.py --trees ../before . --parts 135m:short --out /tmp/two.json     # two versions

A part, `SIZE[:VARIANT,...]` or `head-SIZE` (heads alone), is a process of its own; the JSON is renewed after each.

Model FLOPs a token are 6 (parameters, a tied matrix once) + 6 (layers x query width x sequence length); recomputation
is not counted. The share is of 989 TFLOP/s. `update` is the time of one; launches and the
device's busy time are those of a profiled step, old log-probabilities included, by its number of updates.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import report
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig
from workloads import ROOT, SHAPES

sys.path.insert(0, os.environ.get("SAPO_BENCH_TREE", str(ROOT)))
from sapo_rl.config import Config, ModelConfig, RolloutConfig, TrainerConfig
from sapo_rl.policy import attention, logprobs
from sapo_rl.policy.model import Policy
from sapo_rl.policy.trainer import PolicyTrainer
from sapo_rl.telemetry.timers import Timers
from sapo_rl.types import Group, Prompt, Row, Sample, Stop

TREE = "SAPO_BENCH_TREE"
"""Environment variable: the folder of the version to measure, where it is not this one."""
PEAK = 989e12
"""Dense bfloat16 FLOP/s of one H100 or H200, from the data sheet."""
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
synchronize: Callable[[], None] = torch.cuda.synchronize if CUDA else lambda: None
SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Variant:
    """One way to run an update; the defaults are the program's."""

    budget: int = 32768
    """Packed tokens in a micro-batch."""
    compile: bool = True
    checkpointing: bool = False
    updates: int = 1
    """Updates a rollout batch, each on its own part of it: from the second part on the `old_logps` phase has work."""
    load: str = "1k"
    """`1k`: sequences of 1,024 tokens, 32k an update. `long-tailed`: 128 prompts of 60 tokens, 8 completions each.
    `short`: the same with completions of 8 tokens at most, which leave the chip waiting for the host."""
    change: Callable[[Policy], AbstractContextManager[Any]] = lambda policy: nullcontext()
    """Puts something in the place of the program's own parts."""


def plain_head(policy: Policy) -> AbstractContextManager[Any]:
    """Several passes of plain torch over the logits in place of the Triton kernels."""
    return patch.object(logprobs, "passes", lambda device: (logprobs.statistics, logprobs.gradient))


def compiled_head(policy: Policy) -> AbstractContextManager[Any]:
    """The same passes, fused by torch.compile."""
    fused = torch.compile(logprobs.statistics), torch.compile(logprobs.gradient)
    return patch.object(logprobs, "passes", lambda device: fused)


def rounded_head_gradient(policy: Policy) -> AbstractContextManager[Any]:
    """Each chunk's gradient of the head in bfloat16, added up in float32."""
    return patch.object(logprobs, "add_product", lambda total, left, right: total.add_(left @ right))


@contextmanager
def float32_stream(policy: Policy) -> Iterator[None]:
    """A residual stream in float32, as autocast alone would have it."""

    def widen(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"inputs_embeds": kwargs["inputs_embeds"].float()}

    handle = policy.model.base_model.register_forward_pre_hook(widen, with_kwargs=True)
    yield
    handle.remove()


@contextmanager
def bfloat16_weights(policy: Policy) -> Iterator[None]:
    """No float32 weights at all: cannot learn at small rates, but bounds what a bfloat16 working copy could save."""
    policy.bfloat16()
    yield


VARIANTS = {
    "shipped": Variant(),
    "16k": Variant(budget=16384),
    "8k": Variant(budget=8192),
    "checkpointing": Variant(checkpointing=True),
    "not compiled": Variant(compile=False),
    "plain head": Variant(change=plain_head),
    "compiled head": Variant(change=compiled_head),
    "rounded head gradient": Variant(change=rounded_head_gradient),
    "float32 stream": Variant(change=float32_stream),
    "bfloat16 weights": Variant(change=bfloat16_weights),
    "4 updates": Variant(updates=4),
    "long-tailed": Variant(updates=4, load="long-tailed"),
    "short": Variant(updates=4, load="short"),
    "long-tailed 8k": Variant(updates=4, load="long-tailed", budget=8192),
}
PARTS = (
    "0.5b:shipped,16k,8k,rounded head gradient,plain head,compiled head,float32 stream,bfloat16 weights,not compiled,"
    "checkpointing,4 updates",
    "1.5b:shipped,16k,8k,checkpointing,bfloat16 weights",
    "135m:shipped,8k,long-tailed,long-tailed 8k,short",
    "head-0.5b",
    "head-1.5b",
)
NOTE = (__doc__ or "").split("\n\n")[-1].strip()
COLUMNS = [
    "size", "variant", "tok/s", "MFU", "update", "launches", "device busy", "old log-probs", "pack", "peak GiB",
    "graphs",
]  # fmt: skip
HEAD_COLUMNS = ["size", "head", "forward and backward", "GiB more", "gradient error"]


def build_config(size: str) -> Any:
    """Return the Hugging Face configuration of a size."""
    return SMOLLM2 if size == "135m" else SHAPES[size].config()


def build(size: str) -> Policy:
    """Return a policy of random float32 weights on the device."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(
            build_config(size), attn_implementation=attention.NAME, dtype=torch.float32
        )
    return Policy(model.train(), torch.bfloat16)


def make_groups(load: str, updates: int, vocabulary: int, scale: int) -> list[Group]:
    """Return a rollout batch: `updates` times `scale` tokens in sequences of `scale / 32`, or the long-tailed one."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(count)]

    def group(index: int, prompt: list[int], lengths: list[int]) -> Group:
        rows = [Row(prompt, tokens(length)) for length in lengths]
        samples = [Sample([row], Stop.STOP, (0, 0), advantage=rng.choice((-1.0, 1.0))) for row in rows]
        return Group(Prompt(index, prompt, "", {}), samples)

    if load == "1k":
        return [group(i, tokens(1), [scale // 32 - 1]) for i in range(32 * updates)]
    longest = 8 if load == "short" else scale // 64
    lengths = [[min(longest, 2 + int(rng.expovariate(3 / longest))) for _ in range(8)] for _ in range(128)]
    return [group(i, tokens(60), row) for i, row in enumerate(lengths)]


def flops_per_token(policy: Policy, length: int) -> float:
    """Return the model FLOPs of forward and backward pass, as the module's docstring says."""
    config = policy.model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention_sizes = config.num_hidden_layers * config.num_attention_heads * head_size * length
    return 6 * (sum(p.numel() for p in policy.parameters()) + attention_sizes)


def measure(size: str, name: str, scale: int) -> dict[str, Any]:
    """Run one variant: two steps to warm up, then the median of three."""
    variant = VARIANTS[name]
    policy = build(size)
    if variant.checkpointing:
        policy.model.gradient_checkpointing_enable()
    settings = TrainerConfig(
        updates_per_rollout=variant.updates, tokens_per_micro_batch=variant.budget, compile=variant.compile
    )
    config = Config(ModelConfig("none"), rollout=RolloutConfig(max_completion_tokens=1024), trainer=settings)
    groups = make_groups(variant.load, variant.updates, policy.model.config.vocab_size, scale)
    tokens = sum(len(g.prompt.token_ids) + sum(len(s.token_ids) - 1 for s in g.samples) for g in groups)
    with variant.change(policy):
        trainer = PolicyTrainer(policy, None, config, Accelerator(cpu=not CUDA))
        timers = Timers(partial(torch.cuda.Event, enable_timing=True) if CUDA else None)
        steps, graphs = [], []
        for step in range(5):
            if step == 2 and CUDA:
                torch.cuda.reset_peak_memory_stats()
            with timers("all"):
                trainer.train_on(groups, timers)
            steps.append(timers.take())
            graphs.append(counters["stats"]["unique_graphs"])
            print(f"{size} {name} step {step}: {steps[-1]['time/update']:.3f} s", file=sys.stderr, flush=True)
        update, old_logps, whole = (
            statistics.median(step[f"time/{phase}"] for step in steps[2:]) for phase in ("update", "old_logps", "all")
        )
        kernels = profile(lambda: trainer.train_on(groups, timers))
        found = {
            "tokens": tokens,
            "updates": variant.updates,
            "tokens_per_second": tokens / update,
            "mfu": tokens / update * flops_per_token(policy, scale // 32) / PEAK if variant.load == "1k" else None,
            "seconds": {"update": update, "old_logps": old_logps, "pack": whole - update - old_logps},
            "launches": sum(kernel["calls"] for kernel in kernels) / variant.updates,
            "busy": sum(kernel["ms"] for kernel in kernels) / 1e3 / variant.updates,
            "first_step": steps[0]["time/all"],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else None,
            "graphs_by_step": graphs,
        }
        if name == "shipped":
            found["kernels"] = kernels[:15]
    return found


def profile(step: Callable[[], Any]) -> list[dict[str, Any]]:
    """Return the kernels (operators on a CPU) of one step with their share of the total, those that take most first."""
    activities = [torch.profiler.ProfilerActivity.CUDA if CUDA else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as found:
        step()
    field = "self_device_time_total" if CUDA else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: getattr(event, field), reverse=True)
    total = sum(getattr(event, field) for event in events) or 1
    return [
        {"kernel": e.key[:120], "calls": e.count, "ms": getattr(e, field) / 1e3, "share": getattr(e, field) / total}
        for e in events
        if getattr(e, field) > 0
    ]


def measure_heads(size: str, scale: int) -> Iterator[dict[str, Any]]:
    """Time each head on `scale` tokens, forward and backward from the log-probabilities, best of five."""
    config = build_config(size)
    hidden = torch.randn(scale, config.hidden_size, device=DEVICE).bfloat16().requires_grad_()
    weight = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size, device=DEVICE) / config.hidden_size**0.5)
    targets = torch.randint(config.vocab_size, (scale,), device=DEVICE)
    outside = torch.randn(scale, device=DEVICE)
    exact = torch.autograd.grad(
        ((hidden[:64].float() @ weight.T).log_softmax(-1).gather(1, targets[:64, None])[:, 0] * outside[:64]).sum(),
        hidden,
    )[0][:64]
    for name, head in heads().items():
        try:
            yield {"variant": name, **time_head(head, hidden, weight, targets, outside, exact)}
        except Exception as error:  # a library may be missing or refuse this torch: that is a result
            yield {"variant": name, "error": f"{type(error).__name__}: {str(error)[:300]}"}
        hidden.grad = weight.grad = None
        free()


def time_head(
    head: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor, outside: Tensor, exact: Tensor
) -> dict[str, Any]:
    """Return milliseconds, peak memory beyond the inputs and the relative error of the first tokens' gradients."""
    times = []
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if CUDA else 0
    for _ in range(7):
        hidden.grad = weight.grad = None
        synchronize()
        begin = time.perf_counter()
        head(hidden, weight, targets, outside).backward()
        synchronize()
        times.append(time.perf_counter() - begin)
    assert hidden.grad is not None
    error = (hidden.grad[: len(exact)] - exact).float().norm() / exact.float().norm()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if CUDA else None
    return {"ms": min(times[2:]) * 1e3, "extra_gib": peak, "gradient_error": error.item()}


def heads() -> dict[str, Callable[..., Tensor]]:
    """Return the candidates: f(hidden, weight, targets, outside), the sum of log-probabilities times `outside`."""

    def ours(chunk: int) -> Callable[..., Tensor]:
        def run(hidden: Tensor, weight: Tensor, targets: Tensor, outside: Tensor) -> Tensor:
            with patch.dict(logprobs.CHUNK, {DEVICE.type: chunk}):
                return (logprobs.token_logps(hidden, weight, targets, 1.0)[0] * outside).sum()

        return run

    found = {f"ours, chunks of 2^{power} logits": ours(2**power) for power in (27, 28, 29, 30)}
    return found | {"cut-cross-entropy (no entropy)": cut_cross_entropy, "Liger (no entropy, one loss)": liger}


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, outside: Tensor) -> Tensor:
    """Log-probabilities from cut-cross-entropy, without its skipping of small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    losses = linear_cross_entropy(hidden, weight.to(hidden.dtype), targets, reduction="none", filter_eps=None)
    return -(losses * outside).sum()


def liger(hidden: Tensor, weight: Tensor, targets: Tensor, outside: Tensor) -> Tensor:
    """Liger's fused head: it makes gradients of one plain sum in the forward pass, so `outside` cannot enter."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight.to(hidden.dtype), targets, reduction="sum")


def free() -> None:
    """Give the last variant's memory and graphs back."""
    gc.collect()
    torch._dynamo.reset()
    counters.clear()
    if CUDA:
        torch.cuda.empty_cache()


def run_part(part: str, scale: int) -> None:
    """Measure one part in this process; one JSON line for each variant as it is done."""
    size, _, names = part.partition(":")
    if size.startswith("head-"):
        for found in measure_heads(size.removeprefix("head-"), scale):
            print(json.dumps({"size": size, **found}), flush=True)
        return
    for name in (names or "shipped").split(","):
        try:
            found = measure(size, name, scale)
        except Exception as error:  # out of memory, mostly: that is a result
            found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps({"size": size, "variant": name, **found}), flush=True)
        free()


def row(found: dict[str, Any]) -> list[str]:
    """Return one line of the table."""
    name = found["variant"] + (f" ({found['tree']})" if "tree" in found else "")
    if "error" in found:
        return [found["size"], name, found["error"][:60], *[""] * (len(COLUMNS) - 3)]
    if "ms" in found:
        cells = [f"{found['ms']:.1f} ms", f"{found['extra_gib'] or 0:.1f}", f"{found['gradient_error']:.3f}"]
        return [found["size"], name, *cells]
    seconds, mfu, peak = found["seconds"], found["mfu"], found["peak_gib"]
    return [
        found["size"],
        name,
        f"{found['tokens_per_second']:,.0f}",
        f"{mfu:.1%}" if mfu is not None else "",
        f"{seconds['update'] / found['updates'] * 1e3:.1f} ms",
        f"{found['launches']:,.0f}",
        f"{found['busy'] * 1e3:.1f} ms",
        *(f"{seconds[phase] * 1e3:.0f} ms" for phase in ("old_logps", "pack")),
        f"{peak:.1f}" if peak is not None else "",
        f"{found['graphs_by_step'][1]} then {found['graphs_by_step'][-1]}",
    ]


def main() -> None:
    """Run the parts one after the other, each in a process of its own, while `--limit` lasts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS)
    parser.add_argument("--trees", nargs="+", type=Path, default=[ROOT], help="folders of versions to compare")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=float, default=1500.0, help="seconds for all parts together")
    parser.add_argument("--part-limit", type=float, default=280.0, help="seconds for one part")
    parser.add_argument("--scale", type=int, default=32768 if CUDA else 1024, help="tokens of an update")
    parser.add_argument("--child", help="measure this part here (the bench calls itself with it)")
    options = parser.parse_args()
    if options.child:
        run_part(options.child, options.scale)
        return
    deadline = time.monotonic() + options.limit
    found: list[dict[str, Any]] = []
    for part, tree in ((part, tree) for part in options.parts for tree in options.trees):
        label = {"tree": tree.resolve().name} if len(options.trees) > 1 else {}
        command = [sys.executable, __file__, "--child", part, "--scale", str(options.scale)]
        if (left := deadline - time.monotonic()) < 5:
            found.append({"size": part, "variant": "", "error": "no time left", **label})
            continue
        seconds, env = f"{min(left, options.part_limit):.0f}", os.environ | {TREE: str(tree.resolve())}
        child = subprocess.Popen(["timeout", seconds, *command], stdout=subprocess.PIPE, text=True, env=env)
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("{"):
                found.append(json.loads(line) | label)
                print(" | ".join(row(found[-1])), flush=True)
            save(options.out, found)
        if child.wait():
            found.append({"size": part, "variant": "", "error": f"ended with status {child.returncode}", **label})
    save(options.out, found)


def save(path: Path | None, found: list[dict[str, Any]]) -> None:
    """Write what is measured so far."""
    if path is not None:
        updates = {"columns": COLUMNS, "rows": [row(one) for one in found if "ms" not in one], "note": NOTE}
        heads = {"columns": HEAD_COLUMNS, "rows": [row(one) for one in found if "ms" in one]}
        report.write(path, {**report.facts(), "measured": found, "table": updates, "heads": heads})


if __name__ == "__main__":
    main()
