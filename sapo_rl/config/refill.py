"""Settings of what becomes of groups that teach nothing."""

from __future__ import annotations

from dataclasses import dataclass

from sapo_rl.config.fields import number


@dataclass
class RefillConfig:
    """Whether groups whose samples all earn the same are replaced before a batch is trained on (DAPO, section 3.2).

    Example:
        rollout.refill.max_extra=1.0
    """

    max_extra: float = number(0.0, least=0, most=16)
    """Further prompts that a step may have written in place of such groups, as a share of its own; 0 replaces none."""
    min_spread: float = number(0.0, least=0)
    """A group is replaced where its best and its worst reward differ by no more than this."""


@dataclass
class ReplayConfig:
    """Whether such groups make way for groups of earlier steps with more spread than `rollout.refill.min_spread`.

    Example:
        rollout.replay.size=256 rollout.logprobs=true loss.correction.mode=token_truncate
    """

    size: int = number(0, least=0)
    """Groups that are kept for later steps, all ranks together; 0 trains on none again."""
    max_age: int = number(4, least=1)
    """Steps after which a group is forgotten."""
