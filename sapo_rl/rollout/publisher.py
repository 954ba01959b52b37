"""New weights into the engines, and the check that they run them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from sapo_rl.engines.base import Engine
from sapo_rl.engines.parity import verify_all
from sapo_rl.rollout.collector import Rollouts
from sapo_rl.types import Prompt
from sapo_rl.weights.base import WeightTransport

PROBE_TOKENS = 64
"""Of the reply by which weights are verified; a longer one would cost seconds."""


class Scorer(Protocol):
    """The trainer, as far as its weights are published and checked."""

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """Yield the weights under the names of the checkpoint."""
        ...

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-probability of each token after the first, at temperature 1."""
        ...


class WeightPublisher:
    """Brings the trainer's weights into every engine of this rank, and proves that vLLM runs them.

    Args:
        trainer: whose weights.
        transport: the way to the engines.
        engines: this rank's; none, where it only lends its GPU.
        rollouts: generates with them.
        probe: the prompt whose reply both score.
        dtype: in which both compute.
        timers: times the phase `sync`.
    """

    def __init__(
        self,
        trainer: Scorer,
        transport: WeightTransport[Any],
        engines: Sequence[Engine],
        rollouts: Rollouts,
        probe: Prompt,
        dtype: str,
        timers: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._trainer, self._transport, self._engines = trainer, transport, engines
        self._rollouts, self._probe, self._dtype, self._timers = rollouts, probe, dtype, timers

    @property
    def restarts(self) -> int:
        """How often this rank's engines were started anew."""
        return sum(engine.restarts for engine in self._engines)

    def publish(self, version: int) -> None:
        """Load the weights into the engines under that version; every rank calls it."""
        with self._timers("sync"):
            self._transport.push(self._trainer.named_weights(), self._engines, version)

    def verify(self) -> dict[str, float]:
        """Score what vLLM answers to the probe on both sides; every rank calls it.

        Returns:
            `mismatch/probe_logp_diff`, the largest mean |difference| of an engine in nats; nothing where this rank has
            no engine that can be reached.

        Raises:
            EngineError: they differ by more than the dtype explains.
        """
        prompt = self._probe.token_ids
        groups = self._rollouts.greedy([self._probe], PROBE_TOKENS) if self._engines else []
        reply = groups[0].samples[0].token_ids if groups else prompt  # the trainer's ranks compute together
        token_ids = [*prompt, *reply]
        expected = self._trainer.score(token_ids)
        found = verify_all(self._engines, token_ids, expected, self._dtype, len(prompt))
        return {"mismatch/probe_logp_diff": max(found)} if found else {}
