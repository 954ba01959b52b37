"""Episodes between an engine that says what a test has it say and environments in real processes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tiny import make_tokenizer

from sapo_rl.config import Config, EnvironmentConfig, RewardFunctionConfig
from sapo_rl.engines.base import Completion, Request, Sampling
from sapo_rl.environments.runner.pool import EnvironmentPool, pools_of
from sapo_rl.rollout.collector import Rollouts
from sapo_rl.rollout.episodes import Episodes
from sapo_rl.types import Group, Prompt, Row, Sample

TOKENIZER = make_tokenizer()
ASSISTANT = "<|im_start|>assistant\n"
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
"""A tool that a request names."""


def play_high_low(said: str) -> str:
    """Halve what is left of 1 to 100, by the guesses and answers so far."""
    low, high = 1, 100
    for guess, answer in re.findall(r"assistant\n(\d+)<\|im_end\|>\n<\|im_start\|>user\n(higher|lower)", said):
        low, high = (int(guess) + 1, high) if answer == "higher" else (low, int(guess) - 1)
    return str((low + high) // 2)


@dataclass
class Scripted:
    """An engine that answers a prompt by its text."""

    script: Callable[[str], str]
    seeded: dict[int, str] = field(default_factory=dict)
    """What it answers instead to requests of these seeds."""
    weight_version: int = 0
    restarts: int = 0
    asleep: bool = False
    requests: list[tuple[Request, Sampling]] = field(default_factory=list)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> list[Future[list[Completion]]]:
        self.requests += [(request, sampling) for request in requests]
        return [self.thread.submit(self.answer, request, sampling) for request in requests]

    def answer(self, request: Request, sampling: Sampling) -> list[Completion]:
        assert request.n == 1
        said = self.seeded.get(request.seed or 0) or self.script(TOKENIZER.decode(request.token_ids))
        ids = TOKENIZER(said + "<|im_end|>")["input_ids"]
        assert isinstance(ids, list)
        cut = ids[: sampling.max_tokens]
        logps = [-0.5 - place for place in range(len(cut))] if sampling.logprobs else None
        return [Completion(cut, len(cut) < len(ids), logps)]


def config(name: str | None, tools: tuple[str, ...] = (), **settings: Any) -> Config:
    found = Config(environment=EnvironmentConfig(name, **({"workers": 1} | settings)), tools=[*tools])
    found.rollout.group_size, found.rollout.logprobs, found.reproducible = 2, True, True
    found.reward.functions = {"match": RewardFunctionConfig("exact_match")}
    return found


@contextmanager
def playing(
    cfg: Config,
    script: Callable[[str], str],
    states: bool = False,
    pools: Mapping[str, EnvironmentPool] | None = None,
) -> Iterator[tuple[Episodes, Scripted]]:
    engine: Any = Scripted(script)
    rollouts = Rollouts([engine], cfg.rollout, TOKENIZER, cfg.seed, cfg.reproducible)
    with Episodes(rollouts, pools or pools_of(cfg), cfg, states) as episodes:
        yield episodes, engine


def prompt(index: int = 0, content: Any = "Go.", **columns: Any) -> Prompt:
    return Prompt(index, [1], content, columns)


def play(cfg: Config, script: Callable[[str], str], *prompts: Prompt) -> list[Group]:
    with playing(cfg, script) as (episodes, _):
        return episodes.write(prompts, step=1).groups


def one(cfg: Config, script: Callable[[str], str], **columns: Any) -> Sample:
    return play(cfg, script, prompt(**columns))[0].samples[0]


def trained(row: Row) -> list[str]:
    return [TOKENIZER.decode(row.token_ids[start:end]) for start, end in row.loss_mask or [(0, len(row.token_ids))]]


def call_of(name: str, **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})
