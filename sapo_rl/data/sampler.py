"""The order in which prompts are drawn."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sapo_rl.errors import UserError

if TYPE_CHECKING:
    from sapo_rl.data.pass_rates import Array


def repetition_warning(num_prompts: int, per_step: int) -> str | None:
    """Return what to say where there are fewer prompts than a step takes; None where there are enough."""
    if num_prompts >= per_step:
        return None
    return (
        f"there are {num_prompts} prompt(s) to train on, fewer than the {per_step} of a step, which has the same "
        "prompt several times; lower rollout.batch_size or give more data"
    )


def check_same(state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError where the state of a sampler was taken with other prompts or another seed than `now`."""
    for key in ("num_prompts", "seed"):
        if state[key] != now[key]:
            raise UserError(
                f"resume: the order of prompts was saved with {key}={state[key]}, now {now[key]}; leave data.* and "
                "eval.prompts as they were"
            )


class PromptSampler:
    """Draws `per_step` of `num_prompts` positions at a time, every position once an epoch, for ever.

    A step may span the border of two epochs. Each epoch's order is a function of the seed and the epoch alone, so the
    state is two numbers, and no other random generator is touched.

    Args:
        num_prompts: to choose from.
        per_step: drawn at a time.
        seed: the run's.
        shuffle: whether each epoch has an order of its own.
        chances: for the draw of a step the chance of each prompt to be taken where its turn comes, above 0 to 1; None
            takes all.
    """

    def __init__(
        self,
        num_prompts: int,
        per_step: int,
        seed: int,
        shuffle: bool,
        chances: Callable[[int], Array] | None = None,
    ) -> None:
        if num_prompts < 1 or per_step < 1:
            raise ValueError(f"num_prompts and per_step must be at least 1, got {num_prompts} and {per_step}")
        self._num_prompts = num_prompts
        self._per_step = per_step
        self._seed = seed
        self._shuffle = shuffle
        self._chances = chances
        self._position = 0
        self.epoch = 0
        self._order = self._draw_order()

    def next(self, step: int) -> list[int]:
        """Return the positions of the prompts of a step; steps come in order."""
        chances = self._chances(step) if self._chances else None
        drawn: list[int] = []
        while len(drawn) < self._per_step:
            if self._position == self._num_prompts:
                self.epoch, self._position = self.epoch + 1, 0
                self._order = self._draw_order()
            part = self._order[self._position : self._position + self._per_step - len(drawn)]
            self._position += len(part)
            drawn += part if chances is None else [one for one in part if self._is_taken(one, chances[one])]
        return drawn

    def further(self, drawn: Sequence[int], count: int, step: int) -> list[int]:
        """Return up to `count` other positions than those `drawn` for a step, without a change of the order.

        They are a function of the seed and the step alone; fewer where there are no more that are surely taken.
        """
        taken, chances = {*drawn}, self._chances(step) if self._chances else None
        others = [
            one for one in range(self._num_prompts) if one not in taken and (chances is None or chances[one] == 1)
        ]
        return random.Random(f"further/{self._seed}/{step}").sample(others, min(count, len(others)))

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to draw on from here; plain numbers."""
        return {"epoch": self.epoch, "position": self._position, "num_prompts": self._num_prompts, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            UserError: it was taken with other prompts or another seed, so that the order cannot be continued, or is no
                place in it.
        """
        check_same(state, self.state_dict())
        for key, most in (("position", self._num_prompts), ("epoch", sys.maxsize)):
            if not 0 <= state[key] <= most:
                raise UserError(f"resume: sampler.{key} of the checkpoint is {state[key]}; must be 0 to {most}")
        self.epoch, self._position = state["epoch"], state["position"]
        self._order = self._draw_order()

    def _is_taken(self, position: int, chance: float) -> bool:
        """Whether a prompt is drawn in this epoch: its turn comes once."""
        return chance >= 1 or random.Random(f"turn/{self._seed}/{self.epoch}/{position}").random() < chance

    def _draw_order(self) -> list[int]:
        order = list(range(self._num_prompts))
        if self._shuffle:
            random.Random(f"prompts/{self._seed}/{self.epoch}").shuffle(order)
        return order
