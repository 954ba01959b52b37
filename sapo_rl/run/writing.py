"""What a rank writes completions with and has them scored: engines, reward functions, prompts."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from sapo_rl import run_folder
from sapo_rl.advantages import own_function
from sapo_rl.config import Config, ModelConfig
from sapo_rl.config.engine import VLLM
from sapo_rl.data import build_prompts, load_rows, own
from sapo_rl.engines import own as own_engine
from sapo_rl.engines.base import Engine
from sapo_rl.engines.build import Device, ModelFacts, build_engines, close_all, device_of, model_facts
from sapo_rl.environments import environment_for
from sapo_rl.environments.runner.pool import EnvironmentPool, pools_of
from sapo_rl.evaluation.sets import EvalSet, check_set, default_set, further_functions, named_sets, set_warnings
from sapo_rl.policy.model import check_shapes, load_tokenizer, stop_tokens
from sapo_rl.policy.trainer import objective
from sapo_rl.rewards import RewardPool
from sapo_rl.rollout.collector import Rollouts, Writer
from sapo_rl.rollout.episodes import Episodes
from sapo_rl.rollout.share import Share
from sapo_rl.run import compose, ranks
from sapo_rl.telemetry import trackers
from sapo_rl.types import Prompt


@dataclass(frozen=True, kw_only=True)
class Rank:
    """A rank that has met the others, before anything is started but its reward functions."""

    folder: Path
    config: Config
    frozen: str
    """The config as YAML."""
    token: str
    """Names this process of the run to rollout servers."""
    accelerator: Accelerator
    header: dict[str, str | int | float]
    """What is told of the device."""
    tokenizer: PreTrainedTokenizerBase
    rewards: RewardPool
    facts: ModelFacts
    device: Device

    @property
    def share(self) -> Share:
        """Which prompts are its own."""
        sharing = 1 if self.config.rollout.servers else self.config.rollout.tensor_parallel
        return Share.of_rank(self.accelerator.process_index, self.accelerator.num_processes, sharing)

    def log(self, what: str) -> Path:
        """Return where a kind of its processes prints."""
        return _log(self.folder, self.accelerator, what)


@dataclass(frozen=True)
class Writing:
    """What writes completions; its engines are starting."""

    engines: Sequence[Engine]
    rollouts: Rollouts
    pools: dict[str, EnvironmentPool]
    """By environment; none with one turn."""
    writer: Writer


def meet(folder: Path | None, stack: contextlib.ExitStack) -> Rank:
    """Connect this rank to the others and import what is the user's own; a mistake in it ends it.

    Args:
        folder: the run folder; None on ranks that learn it from rank 0.
        stack: closes what is opened.
    """
    folder, frozen, token = ranks.share(folder)
    config = compose.loads(frozen)
    accelerator = stack.enter_context(ranks.join(config, folder))
    _seed(config, accelerator.process_index)
    header = _device_facts(accelerator)
    if accelerator.is_main_process:
        run_folder.record.add_to_start(folder, {"device": header})
    _import_own(config)
    return Rank(
        folder=folder,
        config=config,
        frozen=frozen,
        token=token,
        accelerator=accelerator,
        header=header,
        tokenizer=load_tokenizer(config.model),
        rewards=stack.enter_context(
            RewardPool(config.reward, _log(folder, accelerator, "rewards"), further_functions(config))
        ),
        facts=_facts(config.model),
        device=device_of(accelerator.local_process_index),
    )


def start_writing(rank: Rank, stack: contextlib.ExitStack, part: str = "") -> Writing:
    """Have vLLM start, which takes longest, and return what writes with it.

    Args:
        rank: whose.
        stack: ends the engines.
        part: names the part of the run since a resume: the engines' seeds depend on it.
    """
    config, tokenizer = rank.config, rank.tokenizer
    stream = f"vllm_rank{rank.accelerator.process_index}/{part}"
    stops = stop_tokens(config.model, tokenizer)
    engines = build_engines(config, rank.facts, rank.device, rank.folder / "logs", stops, stream)
    stack.callback(close_all, engines)
    rollouts = Rollouts(engines, config.rollout, tokenizer, config.seed, config.reproducible)
    pools = pools_of(config, rank.log("environments"))
    states = rank.rewards.sees_environments(config.has_environment)
    writer = stack.enter_context(Episodes(rollouts, pools, config, states)) if pools else rollouts
    for engine in engines:
        engine.start()
    return Writing(engines, rollouts, pools, writer)


def read_prompts(rank: Rank, writing: Writing) -> tuple[list[Prompt], list[Prompt], int]:
    """Return the prompts to train on, the held-out ones, and how many were too long.

    Reward functions and environments are asked whether the columns of the first suffice; those of the others are left
    to `read_sets`.

    Raises:
        UserError: rows that cannot be worded, or columns that reward functions or environments lack.
    """
    config, tokenizer = rank.config, rank.tokenizer
    rows, held_out_rows = load_rows(config.data, config.eval.prompts)
    prompts, dropped = build_prompts(rows, config.data, tokenizer)
    held_out, also_dropped = build_prompts(held_out_rows, config.data, tokenizer) if held_out_rows else ([], 0)
    for prompt in prompts:
        environment_for(config, prompt.columns, prompt.index)
    for user in (rank.rewards, *writing.pools.values()):
        user.check_columns(prompts[0].columns, "the data")  # all have the same columns
    return prompts, held_out, dropped + also_dropped


def read_sets(
    rank: Rank, writing: Writing, prompts: Sequence[Prompt], held_out: list[Prompt]
) -> tuple[list[EvalSet], list[str]]:
    """Return the sets to evaluate on, and what to tell of their prompts.

    Args:
        rank: whose config names them.
        writing: its environments, which are asked whether the columns suffice, as the reward functions are.
        prompts: to train on.
        held_out: the prompts held out of these.

    Raises:
        UserError: rows that cannot be read or worded, or columns that reward functions or environments lack.
    """
    sets = [default_set(rank.config, held_out)] if held_out else []
    sets += named_sets(rank.config, rank.tokenizer)
    for one in sets:
        check_set(rank.config, one, rank.rewards, [*writing.pools.values()])
    return sets, set_warnings(sets, prompts)


def wait_for(engines: Sequence[Engine], rank: Rank, note: Callable[[str], None]) -> None:
    """Return once the engines are ready; `note` shows what is being waited for."""
    rollout = rank.config.rollout
    name = "vLLM" if rollout.engine.name == VLLM else rollout.engine.name
    logs = f"; it writes to {rank.folder / 'logs'}" if rollout.engine.name == VLLM else ""
    note(f"waiting for {', '.join(rollout.servers)}" if rollout.servers else f"{name} is starting{logs}")
    start = time.monotonic()
    for engine in engines:
        engine.wait_ready()
    note(f"{name} is ready, after another {time.monotonic() - start:.0f} s")


def _log(folder: Path, accelerator: Accelerator, what: str) -> Path:
    return folder / "logs" / f"{what}_rank{accelerator.process_index}.log"


def _facts(config: ModelConfig) -> ModelFacts:
    """Read what is known of the model before it is loaded; refuse weights and adapters for which it has no place."""
    facts = model_facts(config)
    check_shapes(config)
    if config.lora.rank:
        from sapo_rl.policy.lora import check_targets  # peft takes a second to import

        return replace(facts, adapted=tuple(check_targets(config)))
    return facts


def _import_own(config: Config) -> None:
    """Find mistakes in what is the user's own before anything is started: loss, advantages, engine, data, trackers."""
    objective(config.loss)
    own_function(config.advantage)
    own_engine.find(config.rollout.engine)
    for name in config.logging.trackers:
        if "." in name:
            trackers.find(name)
    for data in (config.data, *(one.data.beside(config.data) for one in config.eval.sets.values())):
        if own.is_own(data.source):
            own.find(data)


def _seed(config: Config, rank: int) -> None:
    random.seed(config.seed + rank)
    np.random.seed((config.seed + rank) % 2**32)
    torch.manual_seed(config.seed + rank)
    if config.reproducible:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _device_facts(accelerator: Accelerator) -> dict[str, str | int | float]:
    facts: dict[str, str | int | float] = {"device": "cpu", "processes": accelerator.num_processes}
    if accelerator.device.type == "cuda":
        properties = torch.cuda.get_device_properties(accelerator.device)
        facts |= {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    return facts | {"torch_threads": torch.get_num_threads()}
