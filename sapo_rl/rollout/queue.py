"""The batches of a run, generated and scored, one after the other or ahead of the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sapo_rl.advantages import has_spread
from sapo_rl.config import Config
from sapo_rl.data.pass_rates import PassRates, fingerprint, pass_rates_of
from sapo_rl.data.weighted import Sampler
from sapo_rl.rewards import RewardPool, Scoring
from sapo_rl.rollout.collector import RolloutResult, Writer
from sapo_rl.rollout.prefetch import Prefetcher
from sapo_rl.rollout.refill import kept, write_refilled
from sapo_rl.rollout.replay import Arrays, ReplayBuffer
from sapo_rl.rollout.share import Share
from sapo_rl.types import Batch, Group, PassRate, Prompt

T = TypeVar("T")
Timer = Callable[[str], AbstractContextManager[None]]
"""Gives the context of a phase by its name."""


class PendingBatch(NamedTuple):
    """A rollout batch in flight."""

    writing: Future[RolloutResult]
    scoring: Scoring
    """Gets its groups one by one."""
    size: int
    """Groups that it is to have."""
    sampler_state: dict[str, Any]
    """What to save once the batch is trained on."""


class BatchQueue:
    """Draws prompts, has them completed and scored, and yields `(step, batch)` for every step that is left.

    With `rollout.mode=overlap` the next batches are generated while one is trained on: between taking a batch and
    publishing the weights that it was trained into, call `ready_for_new_weights`.

    Args:
        prompts: all of the run, the same on all ranks.
        sampler: draws each step's.
        rates: how often prompts are solved, which the sampler may go by.
        share: which of them are this rank's.
        rollouts: generates with this rank's engines.
        rewards: scores.
        timers: times the phases `rollout` and `reward`.
        config: the run's.
        step: the last step done.
        stopping: whether to end after the step at hand; asked before each, and the same on all ranks.
        gather: joins a list over the ranks.

    Example:
        >>> for step, batch in batches:
        ...     stats = trainer.train_on(batch.groups, timers)
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampler: Sampler,
        rates: PassRates,
        share: Share,
        rollouts: Writer,
        rewards: RewardPool,
        timers: Timer,
        config: Config,
        step: int,
        stopping: Callable[[], bool],
        gather: Callable[[list[Any]], list[Any]],
    ) -> None:
        self.step = step
        """The step of the batch that was yielded last."""
        self.last = config.trainer.steps
        self._prompts, self._sampler, self._rates, self._share = prompts, sampler, rates, share
        self._places = {prompt.index: place for place, prompt in enumerate(prompts)}
        self._rollouts, self._rewards, self._timers = rollouts, rewards, timers
        self._stopping, self._gather = stopping, gather
        self._solving, self._solved_at = config.solving, config.data.pass_rate.solved_at
        self._refill, self._functions, self._combine = config.rollout.refill, config.rewards, config.advantage.combine
        self._sampler_state = sampler.state_dict()
        self._replay = self._replay_buffer(config)
        self._ahead = Prefetcher(
            self._begin,
            self._finish,
            last=self.last,
            prefetch=config.prefetch,
            in_flight=config.in_flight,
        )

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        while self.step < self.last and not self._stopping():
            self.step += 1
            batch = self._ahead.take(self.step)
            self._sampler_state = batch.sampler_state
            self._rates.record(self.step, self._gather([*batch.pass_rates]))
            yield self.step, self._replay.fill(self.step, batch) if self._replay else batch

    def state_dict(self) -> dict[str, Any]:
        """Return where the order of prompts stands after the batch that was yielded last; the sampler may be ahead."""
        return self._sampler_state | {"pass_rates": self._rates.state_dict()}

    def replay_state(self) -> Arrays:
        """Return the groups that this rank may train on again; nothing without `rollout.replay`."""
        return self._replay.state() if self._replay else {}

    def load_replay(self, files: Sequence[Path]) -> None:
        """Go on with the groups that a checkpoint has in the files of its ranks."""
        if self._replay and files:
            self._replay.load(files, self._share, {prompt.index: prompt for prompt in self._prompts})

    def pass_rates(self) -> dict[str, Sequence[Any]]:
        """Return what is known of the prompts so far, as columns of `pass_rates.parquet`."""
        rates, samples = self._rates.at()
        known = [place for place, count in enumerate(samples) if count]
        return {
            "fingerprint": [fingerprint(self._prompts[place].content) for place in known],
            "prompt_index": [self._prompts[place].index for place in known],
            "pass_rate": rates[known].tolist(),
            "samples": samples[known].tolist(),
        }

    def sleep(self) -> None:
        """Have the engines give the trainer their memory, where both do not fit; the next weights wake them."""
        self._rollouts.sleep()

    def metrics(self) -> dict[str, float]:
        """Return how often prompts are solved (`data/*`), and how long the training has waited since the last call."""
        return self._rates.metrics() | {"time/wait": self._ahead.take_waited()}

    def ready_for_new_weights(self) -> None:
        """Block until no batch is being generated, unless batches may span a weight update."""
        self._ahead.ready_for_new_weights()

    def wait(self) -> None:
        """Block until the engines have nothing to do. Raises what making a batch raised."""
        self._ahead.wait()

    def close(self) -> None:
        """Make nothing more; what is being made is not waited for."""
        self._ahead.close()

    def _begin(self, step: int) -> PendingBatch:
        """Draw prompts, the same on all ranks, and have this rank's completed."""
        drawn = self._sampler.next(step)
        extra = math.ceil(self._refill.max_extra * len(drawn))
        further = self._sampler.further(drawn, extra, step) if extra else []  # it looks through all prompts
        own, others = (self._share.of([self._prompts[index] for index in indices]) for indices in (drawn, further))
        scoring = self._rewards.scoring()
        if others:
            writing = _in_thread(lambda: write_refilled(self._rollouts, own, others, step, scoring, self._keeps))
        else:
            writing = _in_thread(lambda: self._rollouts.write(own, step, on_group=scoring.add))
        return PendingBatch(writing, scoring, len(own), self._sampler.state_dict())

    def _finish(self, pending: PendingBatch) -> Batch:
        """Wait for the groups of a batch, of which each is scored while others are generated, and for their scores."""
        with pending.scoring:
            with self._timers("rollout"):
                written = pending.writing.result().checked()
            with self._timers("reward"):
                scores = pending.scoring.result(written.groups)
        groups, rates = scores.groups, self._pass_rates(scores.groups)
        if self._refill.max_extra:
            groups = kept(groups, pending.size, self._keeps)
        state, count = pending.sampler_state, len(written.groups)
        return Batch(groups, scores.stats, state, written.usage, written.dropped, written=count, pass_rates=rates)

    def _replay_buffer(self, config: Config) -> ReplayBuffer | None:
        settings, ranks = config.rollout.replay, self._share.count
        if not settings.size or not ranks:
            return None
        size, seed = math.ceil(settings.size / ranks), f"{config.seed}/{self._share.index}"
        return ReplayBuffer(size, settings.max_age, seed, self._keeps, list(config.rewards))

    def _pass_rates(self, groups: Sequence[Group]) -> list[PassRate]:
        rates = pass_rates_of(groups, self._solving, self._solved_at)
        return [
            PassRate(self._places[group.prompt.index], rate, len(group.samples))
            for group, rate in zip(groups, rates, strict=True)
            if rate is not None
        ]

    def _keeps(self, group: Group) -> bool:
        """Whether a scored group teaches something, and is not to be replaced."""
        return has_spread(group, self._functions, self._combine, self._refill.min_spread)


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """Start `work` in a thread of its own."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)  # of new work
    return future
