"""What flows through a step: prompts, then samples, then groups of samples.

Ragged lists carry their axes in the name: P prompts of a step, G samples of a prompt, T tokens of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

Messages: TypeAlias = list[dict[str, str]]
"""A chat: dictionaries with the keys `role` and `content`."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of the dataset, tokenised once."""

    index: int
    """Position in the dataset: stable over epochs, resumes and ranks."""
    token_ids: list[int]
    """What vLLM is given: the chat template already applied."""
    content: str | Messages
    """What reward functions see as the prompt: text, or messages where the dataset holds messages."""
    columns: dict[str, Any]
    """Every other column of the row, passed on to the reward functions by name; the answer is `answer`."""


@dataclass(slots=True)
class Sample:
    """One completion of a prompt; the stages after the rollout fill in their fields."""

    token_ids: list[int]
    """Completion tokens, the end-of-sequence token included where one was produced."""
    truncated: bool
    """True where the length limit, not the model, ended the completion."""
    weight_version: int
    """Version of the weights that produced it: the number of updates of vLLM's weights before it."""
    rollout_logps: list[float] | None = None
    """vLLM's log-probabilities of `token_ids`, where the config asks for them."""
    text: str = ""
    """The decoded completion, special tokens skipped."""
    rewards: dict[str, float | None] = field(default_factory=dict)
    """Each reward function's value by its name in the config; None where it does not apply."""
    reward: float | None = None
    """The weighted sum of `rewards`; None where none applies."""
    advantage: float = 0.0
    """The group-normalised advantage, shared by every token of the completion."""


@dataclass(slots=True)
class Group:
    """A prompt and its G samples: the unit in which advantages are normalised, never split over ranks."""

    prompt: Prompt
    samples: list[Sample]


@dataclass(slots=True)
class RewardStats:
    """What happened while one batch was scored; dictionaries by the function's name in the config."""

    errors: dict[str, int]
    """Samples on which the function failed and that were scored 0."""
    not_applicable: dict[str, int]
    """Samples for which the function returned None."""
    failures: dict[str, str]
    """The text of the first failure of each function that failed."""


@dataclass(frozen=True)
class Usage:
    """How long the engines of a rank worked on one batch, in seconds from its start.

    Example:
        >>> Usage(until=[4.0, 2.0], whole=4.0)  # the second engine had nothing to do for the last two seconds
    """

    until: list[float]
    """By engine: its last answer; 0 where it gave none."""
    whole: float
    """The last answer of all."""


@dataclass(frozen=True)
class Batch:
    """One rank's scored completions of a step."""

    groups: list[Group]
    scoring: RewardStats
    sampler_state: dict[str, Any]
    """Where the order of prompts stands after it."""
    usage: Usage
    """How long the engines wrote on it."""
