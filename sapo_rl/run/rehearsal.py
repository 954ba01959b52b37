"""What a dry run tries out, so that a mistake is told before a run: the data, the user's own code, the memory."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from sapo_rl.advantages import own_function
from sapo_rl.config import Config
from sapo_rl.config.engine import VLLM
from sapo_rl.config.evaluation import EvalSampling
from sapo_rl.data import load_rows, load_set, repetition_warning
from sapo_rl.data.pass_rates import read_pass_rates
from sapo_rl.data.prompts import Rows, columns_of, content_of, with_all_columns
from sapo_rl.environments import environment_for
from sapo_rl.environments.runner.pool import EnvironmentPool
from sapo_rl.errors import UserError
from sapo_rl.errors.files import expand, is_file, reading
from sapo_rl.evaluation.sets import comparison_warnings, further_functions, jury, key_of, reading_set
from sapo_rl.processes import DRY_RUN
from sapo_rl.rewards import RewardPool, isolation_warning
from sapo_rl.rollout.filters import filter_warning
from sapo_rl.run import launch
from sapo_rl.sizing import GIB, element_size, fsdp_memory, gathered_bytes, is_kept
from sapo_rl.types import Messages

REMEDIES = {
    "activations": "lower trainer.tokens_per_micro_batch or set trainer.gradient_checkpointing=true",
    "vLLM's cache": "lower rollout.cpu_kv_cache_gb",
    "gathered weights": "set fsdp_reshard_after_forward: true in the launch profile",
    "float32 weights": "take a smaller model or model.lora.rank=16, or more GPUs with launch=fsdp2",
}
"""What to change where a use of memory, by the beginning of its name, is the largest."""


@dataclass(frozen=True)
class Trial:
    """What trying out a config has shown."""

    data: dict[str, str]
    """Counts of rows and columns, and the longest prompt, in words and numbers."""
    warnings: list[str]
    """What a run would do without a word, or with one later."""


def rehearse(config: Config) -> Trial:
    """Read the data, word every prompt, and import what is the user's own, most of it in killable processes.

    Raises:
        UserError: as a run would, naming the file, row, column or function.
    """
    if "." in config.loss.name:
        from sapo_rl.policy.trainer import objective  # imports torch

        objective(config.loss)
    own_function(config.advantage)
    if config.rollout.engine.name != VLLM:
        from sapo_rl.engines import own  # imports torch

        own.find(config.rollout.engine)
    with reading("data"):
        train, held_out = load_rows(config.data, config.eval.prompts)
        train, held_out = with_all_columns(train, config.data), with_all_columns(held_out, config.data)
        facts, warnings = _look_at(config, train, held_out)
        sets = {name: _set_columns(config, name, facts) for name in config.eval.sets}
    own = {
        source: columns_of(row, config.data)
        for rows, source in ((train, "the data"), (held_out, "the held-out data"))
        for row in list(rows.values())[:1]  # all have the same columns
    }
    _check_columns(config, own, sets)
    return Trial(facts, warnings + _setting_warnings(config))


def rehearse_evaluation(config: Config) -> Trial:
    """Read and word the prompts of all sets, and import what is the user's own, as `rehearse` does for a training."""
    facts: dict[str, str] = {}
    own: dict[str, dict[str, Any]] = {}
    with reading("data"):
        if config.eval.prompts:
            _, rows = load_rows(config.data, config.eval.prompts)
            rows = with_all_columns(rows, config.data)
            for number, row in rows.items():
                content_of(row, number, config.data)
                environment_for(config, row, number)
            facts["held-out rows"] = f"{len(rows):,} prompts, {_times(config.eval)}"
            own["the held-out data"] = columns_of(next(iter(rows.values())), config.data)
        sets = {name: _set_columns(config, name, facts) for name in config.eval.sets}
    _check_columns(config, own, sets)
    return Trial(facts, comparison_warnings(config))


@contextlib.contextmanager
def _trying_out() -> Iterator[None]:
    """Tell the processes that are started meanwhile that this is a dry run."""
    os.environ[DRY_RUN] = "1"
    try:
        yield
    finally:
        del os.environ[DRY_RUN]


@_trying_out()
def _check_columns(config: Config, own: dict[str, dict[str, Any]], sets: dict[str, dict[str, Any]]) -> None:
    """Refuse columns, by whose they are and by set, that reward functions and environments cannot work with."""
    with reading("reward"), RewardPool(replace(config.reward, workers=1), further=further_functions(config)) as pool:
        pool.sees_environments(config.has_environment)
        for source, columns in own.items():
            pool.check_columns(columns, source)
        for name, columns in sets.items():
            pool.check_columns(columns, f"{key_of(name)}.data", list(jury(config, name).functions))
    for name in config.played:
        with reading("environment"):
            environments = EnvironmentPool(config, name, workers=1)
            asyncio.run(environments.look())
            for source, columns in own.items():
                environments.check_columns(columns, source)
            for each, columns in sets.items():
                environments.check_columns(columns, f"{key_of(each)}.data")


def _set_columns(config: Config, name: str, facts: dict[str, str]) -> dict[str, Any]:
    """Word the prompts of a set of evaluations, count them in `facts`, and return the columns of the first."""
    settings = config.eval.sets[name]
    data = settings.data.beside(config.data)
    with reading_set(name):
        rows = with_all_columns(load_set(data, settings.prompts), data)
        for number, row in rows.items():
            content_of(row, number, data)
            environment_for(config, row, number)
    facts[f"eval set {name}"] = f"{len(rows):,} prompts, {_times(settings)}"
    return columns_of(next(iter(rows.values())), data)


def _times(settings: EvalSampling) -> str:
    """How often each prompt of a set is answered, in words."""
    greedy, sampled = ["greedily"] * settings.greedy, [f"{settings.samples} samples"] * bool(settings.samples)
    return " and ".join(greedy + sampled)


def _look_at(config: Config, train: Rows, held_out: Rows) -> tuple[dict[str, str], list[str]]:
    contents = {number: content_of(row, number, config.data) for number, row in train.items()}
    texts = {number: _text(content) for number, content in contents.items()}
    for number, row in held_out.items():
        content_of(row, number, config.data)
    longest = max(texts.values(), key=len)
    tokens = _tokens(config, longest)
    length = f"{len(longest):,} characters" + (f", {tokens:,} tokens before the chat template" if tokens else "")
    facts = {
        "rows to train on": f"{len(train):,}",
        "held-out rows": f"{len(held_out):,}",
        "columns": ", ".join(map(str, next(iter(train.values())))),
        **_environments(config, train, held_out),
        **_pass_rates(config, list(contents.values())),
        "longest prompt": length,
    }
    prompts, limit = config.rollout.batch_size // config.rollout.group_size, config.data.max_prompt_tokens
    warnings = [text] if (text := repetition_warning(len(train), prompts)) else []
    if tokens > limit:
        warnings.append(
            f"the longest prompt has {tokens:,} tokens; above data.max_prompt_tokens={limit} they are left out"
        )
        shortest = min(_tokens(config, text) for text in texts.values())
        if shortest > limit:
            raise UserError(
                f"data.max_prompt_tokens: all {len(train)} prompts are longer than {limit} tokens, the shortest has "
                f"{shortest}"
            )
    return facts, warnings


def _environments(config: Config, train: Rows, held_out: Rows) -> dict[str, str]:
    """How many rows to train on each of several environments has. Raises UserError where a row has none."""
    for number, row in held_out.items():
        environment_for(config, row, number)
    found = Counter(environment_for(config, row, number) for number, row in train.items())
    counts = ", ".join(f"{name} {found[name]:,}" for name in config.environments)
    return {"rows by environment": counts} if counts else {}


def _pass_rates(config: Config, contents: Sequence[str | Messages]) -> dict[str, str]:
    """How many rows to train on have a pass rate before the run."""
    path = None if config.resume or config.fork else config.data.pass_rate.path
    return {"rows with a pass rate": f"{len(read_pass_rates(path, contents)):,}"} if path else {}


def _text(content: str | Messages) -> str:
    return content if isinstance(content, str) else "\n".join(message["content"] for message in content)


def _tokens(config: Config, text: str) -> int:
    """The tokens of a text by a local model's tokenizer; 0 where there is none that is read without transformers."""
    tokenizer = _tokenizer(expand(config.model.path) / "tokenizer.json")
    return 0 if tokenizer is None else len(tokenizer.encode(text, add_special_tokens=False).ids)


@functools.cache
def _tokenizer(file: Path) -> Any:
    if not is_file(file):
        return None
    from tokenizers import Tokenizer

    with reading(str(file)):
        return Tokenizer.from_file(str(file))


def _setting_warnings(config: Config) -> list[str]:
    filtered = filter_warning(config.rollout, config.loss.correction.by_token)
    isolated = isolation_warning(config.reward.functions | further_functions(config))
    found = [filtered, isolated, *comparison_warnings(config)]
    if config.loss.name == "sapo":
        from sapo_rl.policy.temperatures import temperature_warning  # imports torch, which takes seconds

        found.append(temperature_warning(config))
    return [text for text in found if text]


def memory_warning(config: Config, rows: Mapping[str, float], count: int) -> str | None:
    """Compare an estimate with this machine's memory.

    Args:
        config: the run's.
        rows: bytes by use, of one process that shards nothing.
        count: parameters of the model.

    Returns:
        What does not fit, and what to change; None where all fits.
    """
    gpu = gpu_memory()
    taken = _of_a_rank(config, rows, count, gpu)
    if gpu is None:
        processes = config.launch.num_processes // config.launch.num_machines
        needed, there, where = sum(taken.values()) * processes, psutil.virtual_memory().total, "this machine has"
    else:
        needed = sum(value for name, value in taken.items() if not name.startswith("vLLM"))
        there, where = gpu, "the GPU has"
    if needed <= there:
        return None
    name, largest = max(taken.items(), key=lambda item: item[1])
    remedy = next((text for use, text in REMEDIES.items() if name.startswith(use)), "take a smaller model")
    return (
        f"the run takes about {needed / GIB:,.0f} GiB, {where} {there / GIB:,.0f} GiB; the most, "
        f"{largest / GIB:,.0f} GiB, are for {name}: {remedy}"
    )


def _of_a_rank(config: Config, rows: Mapping[str, float], count: int, gpu: int | None) -> dict[str, float]:
    """What each rank takes where one that shards nothing takes `rows`; `gpu` as `gpu_memory`."""
    ranks, settings = config.launch.num_processes, launch.fsdp(config.launch.profile)
    if settings is None:
        share = ranks if launch.shards(config.launch.profile) else 1
        return {name: value / (share if name.startswith("float32 weights") else 1) for name, value in rows.items()}
    size = element_size(config)
    keeps = (gpu is not None and is_kept(count, size, gpu)) or not settings.get("fsdp_reshard_after_forward", True)
    return fsdp_memory(rows, ranks, keeps * gathered_bytes(count, 0 if config.model.lora.rank else count, size))


def cpu_cache(config: Config) -> dict[str, float]:
    """Return the bytes of vLLM's cache where it runs on the CPU; nothing on a GPU, where it takes what is free."""
    return {} if gpu_memory() else {"vLLM's cache": config.rollout.cpu_kv_cache_gb * GIB}


@functools.cache
def gpu_memory() -> int | None:
    """Return the bytes of the smallest GPU's memory as the driver tells it; None without a GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    sizes = [int(size) * 2**20 for size in told if size.isdecimal()]
    return min(sizes, default=None)
