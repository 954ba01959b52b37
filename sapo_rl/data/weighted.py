"""Prompts drawn by their pass rates, and which sampler a run has."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import count, islice
from typing import Any, Protocol

import numpy as np

from sapo_rl.config.data import BY_PASS_RATE, DataConfig
from sapo_rl.data.pass_rates import Array, PassRates
from sapo_rl.data.sampler import PromptSampler, check_same


class Sampler(Protocol):
    """Chooses the prompts of each step, by their positions; the same on all ranks."""

    def next(self, step: int) -> list[int]:
        """Return the positions of the prompts of a step; steps come in order."""
        ...

    def further(self, drawn: Sequence[int], count: int, step: int) -> list[int]:
        """Return up to `count` other positions than those `drawn` for a step, without a change of what comes next."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to draw on from here; plain numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises UserError where it was taken with other prompts or another seed."""
        ...


class WeightedSampler:
    """Draws the prompts of each step by weight, without replacement within a step while there are enough.

    Each prompt gets the time -log(u) / w of an exponential race, with u uniform and w its weight, and the first ones
    are drawn (Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir"). The u are a function of the
    seed and the step alone.

    Args:
        num_prompts: to choose from.
        per_step: drawn at a time.
        seed: the run's.
        weights: of all prompts, above 0, for the draw of a step.
    """

    def __init__(self, num_prompts: int, per_step: int, seed: int, weights: Callable[[int], Array]) -> None:
        self._num_prompts, self._per_step, self._seed = num_prompts, per_step, seed
        self._weights = weights

    def next(self, step: int) -> list[int]:
        """Return the positions of the prompts of a step."""
        weights = self._weights(step)
        places = (place for turn in count() for place in self._race(weights, step, turn))
        return list(islice(places, self._per_step))

    def further(self, drawn: Sequence[int], count: int, step: int) -> list[int]:
        """Return up to `count` other positions than those `drawn`: the next ones in the race of the step."""
        taken = {*drawn}
        return [place for place in self._race(self._weights(step), step, 0) if place not in taken][:count]

    def state_dict(self) -> dict[str, Any]:
        """Return by what a resume is held to the same prompts; where a draw stands, its step alone tells."""
        return {"num_prompts": self._num_prompts, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on. Raises UserError where `state` was taken with other prompts or another seed."""
        check_same(state, self.state_dict())

    def _race(self, weights: Array, step: int, turn: int) -> list[int]:
        """All positions in the order in which they arrive."""
        rng = random.Random(f"weighted/{self._seed}/{step}/{turn}")
        uniform = np.array([rng.random() for _ in range(self._num_prompts)])
        return np.argsort(-np.log1p(-uniform) / weights, kind="stable").tolist()


def build_sampler(cfg: DataConfig, rates: PassRates, num_prompts: int, per_step: int, seed: int) -> Sampler:
    """Return the sampler that `data.sampling` names; `rates` are what it goes by."""
    if cfg.sampling == BY_PASS_RATE:
        return WeightedSampler(num_prompts, per_step, seed, rates.weights)
    filtered = cfg.pass_rate.low is not None or cfg.pass_rate.high is not None
    return PromptSampler(num_prompts, per_step, seed, cfg.shuffle, rates.weights if filtered else None)
