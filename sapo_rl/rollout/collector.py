"""Prompts in, groups of samples out, over all engines of a rank."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from sapo_rl.config import RolloutConfig
from sapo_rl.engines.base import Completion, Engine, Request, Sampling
from sapo_rl.processes import at_once
from sapo_rl.rollout.dispatch import Dispatcher
from sapo_rl.types import Group, Prompt, Row, Sample, Stop, Usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def sampling_of(cfg: RolloutConfig) -> Sampling:
    """Return the sampling that `cfg` asks for."""
    return Sampling(
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        top_k=cfg.top_k,
        min_p=cfg.min_p,
        repetition_penalty=cfg.repetition_penalty,
        max_tokens=cfg.max_completion_tokens,
        logprobs=cfg.logprobs,
    )


def request_seed(seed: int, step: int, index: int) -> int:
    """Return a seed below 2^62 for prompt `index` in `step` of a run, far from any other: vLLM counts up from it."""
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


class RolloutResult(NamedTuple):
    """The finished groups of one `write` call, and how long each engine was busy."""

    groups: list[Group]
    """In the prompts' order."""
    usage: Usage
    """How long they wrote."""


class Rollouts:
    """Generates groups with the weights that the engines hold.

    Args:
        engines: all with the same weights; each takes the next prompt whenever it has room, the samples of a prompt
            together, so that none is idle while another has a queue.
        cfg: sampling and group size.
        tokenizer: decodes completions, those of a prompt at once.
        seed: the run's.
        reproducible: seed every completion by run, step and prompt, so that the engines' number and state do not count.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        cfg: RolloutConfig,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        reproducible: bool,
    ) -> None:
        self.engines = engines
        self.group_size = cfg.group_size
        self.capacity = cfg.max_num_seqs
        self.lost_timeout = cfg.start_timeout
        self.sampling = sampling_of(cfg)
        self.tokenizer = tokenizer
        self.seed = seed
        self.reproducible = reproducible

    def generate(self, prompts: Sequence[Prompt], step: int, n: int | None = None) -> list[Group]:
        """Sample `n` completions (default: the group size) of each prompt; groups in the prompts' order."""
        return self.write(prompts, step, n).groups

    def write(
        self,
        prompts: Sequence[Prompt],
        step: int,
        n: int | None = None,
        on_group: Callable[[Group], None] = lambda group: None,
    ) -> RolloutResult:
        """Do as `generate`, which may be under way in several threads where all engines are on this machine.

        `on_group` gets each group as soon as it is finished, in the thread of the engine that wrote it.
        """
        requests = [
            Request(
                prompt.token_ids,
                n or self.group_size,
                request_seed(self.seed, step, prompt.index) if self.reproducible else None,
            )
            for prompt in prompts
        ]
        return self._run(prompts, requests, self.sampling, on_group)

    def greedy(self, prompts: Sequence[Prompt], most: int | None = None) -> list[Group]:
        """Return the likeliest completion of each prompt, token by token, `most` at most: groups of one."""
        requests = [Request(prompt.token_ids, 1) for prompt in prompts]
        limit = min(self.sampling.max_tokens, most or self.sampling.max_tokens)
        sampling = replace(self.sampling, temperature=0.0, logprobs=False, max_tokens=limit)
        return self._run(prompts, requests, sampling, lambda group: None).groups

    def sleep(self) -> None:
        """Have the engines free the GPU's memory, as far as their settings say, until the next call or weights."""
        at_once([engine.sleep for engine in self.engines])

    def _run(
        self,
        prompts: Sequence[Prompt],
        requests: list[Request],
        sampling: Sampling,
        on_group: Callable[[Group], None],
    ) -> RolloutResult:
        finished: dict[int, Group] = {}
        if not requests:
            return RolloutResult([], Usage([], 0.0))
        # Where all fit at once each engine gets an even share; else each keeps as many waiting as it decodes.
        share = math.ceil(sum(request.n for request in requests) / len(self.engines))
        window = min(share, 2 * self.capacity)

        def answer(engine: Engine, version: int, i: int, completions: list[Completion]) -> None:
            finished[i] = self._group(prompts[i], completions, version)
            on_group(finished[i])

        usage = Dispatcher(self.engines, requests, window, sampling, self.lost_timeout, answer).run()
        return RolloutResult([finished[i] for i in range(len(prompts))], usage)

    def _group(self, prompt: Prompt, completions: Sequence[Completion], version: int) -> Group:
        texts = self.tokenizer.batch_decode([one.token_ids for one in completions], skip_special_tokens=True)
        return Group(
            prompt,
            [
                Sample(
                    [Row(prompt.token_ids, one.token_ids, rollout_logps=one.logps)],
                    Stop.LENGTH if one.truncated else Stop.STOP,
                    versions=(version, version),
                    text=text,
                )
                for one, text in zip(completions, texts, strict=True)
            ],
        )
