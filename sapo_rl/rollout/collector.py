"""Prompts in, groups of samples out, over all engines of a rank."""

from __future__ import annotations

import hashlib
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from sapo_rl.config import RolloutConfig
from sapo_rl.engines.base import Engine, Request, Sampling
from sapo_rl.errors import UserError
from sapo_rl.processes import at_once
from sapo_rl.rollout.dispatch import Answer, Dispatcher, Session
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


def greedy_of(sampling: Sampling, most: int | None = None) -> Sampling:
    """Return the sampling that takes the likeliest tokens, `most` at most, without their log-probabilities."""
    limit = min(sampling.max_tokens, most or sampling.max_tokens)
    return replace(sampling, temperature=0.0, logprobs=False, max_tokens=limit)


def usage_of(answers: Sequence[Answer], start: float, engines: int) -> Usage:
    """Return how long `engines` engines wrote on these answers; `start` is on the clock of `time.perf_counter`."""
    until = [max((one.at - start for one in answers if one.engine == index), default=0.0) for index in range(engines)]
    return Usage(until, max(until, default=0.0))


def seed_of(*place: int) -> int:
    """Return a seed below 2^62 for a place in a run (its seed, a step, a prompt, ...), far from that of any other.

    vLLM counts up from it.
    """
    digest = hashlib.blake2b("/".join(map(str, place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


class RolloutResult(NamedTuple):
    """The finished groups of one `write` call, and how long each engine was busy."""

    groups: list[Group]
    """In the prompts' order."""
    usage: Usage
    """How long they wrote."""
    dropped: Sequence[str] = ()
    """What failed in each episode that is missing."""

    def checked(self) -> RolloutResult:
        """Return it as it is, where it is a batch with something in it.

        Raises:
            UserError: every episode is missing.
        """
        if self.dropped and not any(group.samples for group in self.groups):
            raise UserError(f"no episode is left; {self.dropped[0]}")
        return self


class Writer(Protocol):
    """What writes groups with the weights that the engines hold: `Rollouts`, or `Episodes` where they have turns."""

    def write(
        self,
        prompts: Sequence[Prompt],
        step: int,
        n: int | None = None,
        on_group: Callable[[Group], object] = lambda group: None,
        sampling: Sampling | None = None,
    ) -> RolloutResult:
        """Return the groups of `n` samples of each prompt, the group size by default, in the prompts' order.

        `on_group` gets each as soon as it is finished, in any thread. With a `sampling` of their own, as an evaluation
        has it, they are begun before all that waits for an engine.
        """
        ...

    def sleep(self) -> None:
        """Have the engines free the GPU's memory until the next call or weights."""
        ...


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
        self.sampling = sampling_of(cfg)
        self.tokenizer = tokenizer
        self.seed = seed
        self.reproducible = reproducible
        # As many wait in each engine as it decodes, so that it never lacks work.
        self._dispatcher = Dispatcher(engines, 2 * cfg.max_num_seqs, cfg.start_timeout)

    def write(
        self,
        prompts: Sequence[Prompt],
        step: int,
        n: int | None = None,
        on_group: Callable[[Group], object] = lambda group: None,
        sampling: Sampling | None = None,
    ) -> RolloutResult:
        """See `Writer.write`. Several threads may call it. What an engine raises ends the whole call."""
        requests = [
            Request(
                prompt.token_ids,
                n or self.group_size,
                seed_of(self.seed, step, prompt.index) if self.reproducible else None,
            )
            for prompt in prompts
        ]
        return self._run(prompts, requests, sampling or self.sampling, on_group, urgent=sampling is not None)

    def greedy(self, prompts: Sequence[Prompt], most: int | None = None) -> list[Group]:
        """Return the likeliest completion of each prompt, token by token, `most` at most: groups of one.

        They are begun before all that waits for an engine.
        """
        return self.write(prompts, 0, 1, sampling=greedy_of(self.sampling, most)).groups

    def submit(self, request: Request, sampling: Sampling, session: Session, urgent: bool) -> Future[Answer]:
        """Return at once with a future of the answer to one turn of an episode; `session` is the episode's.

        What is `urgent` is begun before all that waits for an engine.
        """
        return self._dispatcher.submit(request, sampling, session, urgent)

    def sleep(self) -> None:
        """Have the engines free the GPU's memory, as far as their settings say, until the next call or weights."""
        at_once([engine.sleep for engine in self.engines])

    def _run(
        self,
        prompts: Sequence[Prompt],
        requests: list[Request],
        sampling: Sampling,
        on_group: Callable[[Group], object],
        urgent: bool,
    ) -> RolloutResult:
        start = time.perf_counter()
        groups: dict[int, Group] = {}
        finished: queue.SimpleQueue[int] = queue.SimpleQueue()
        answers = self._dispatcher.submit_all(requests, sampling, urgent)
        try:
            for index, future in enumerate(answers):
                future.add_done_callback(lambda _, index=index: finished.put(index))
            while len(groups) < len(requests):
                index = finished.get()
                answer = answers[index].result()
                # Decoded here: in the engine's own thread it would keep other answers waiting.
                groups[index] = self._group(prompts[index], answer)
                on_group(groups[index])
        except BaseException:
            for future in answers:
                future.cancel()
            raise
        usage = usage_of([future.result() for future in answers], start, len(self.engines))
        return RolloutResult([groups[index] for index in range(len(prompts))], usage)

    def _group(self, prompt: Prompt, answer: Answer) -> Group:
        completions, versions = answer.completions, (answer.oldest_version, answer.newest_version)
        texts = self.tokenizer.batch_decode([one.token_ids for one in completions], skip_special_tokens=True)
        return Group(
            prompt,
            [
                Sample(
                    [Row(prompt.token_ids, one.token_ids, rollout_logps=one.logps)],
                    Stop.LENGTH if one.truncated else Stop.STOP,
                    versions=versions,
                    text=text,
                )
                for one, text in zip(completions, texts, strict=True)
            ],
        )
