"""Samples of one row, as an engine's completions become."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sapo_rl.policy.packing import Item
from sapo_rl.types import Group, Prompt, Row, Sample, Stop


def one_row(
    token_ids: list[int],
    prompt_ids: list[int] | None = None,
    *,
    stop: Stop = Stop.STOP,
    version: int = 0,
    rollout_logps: list[float] | None = None,
    **more: Any,
) -> Sample:
    """A sample of one row after `prompt_ids`, [1] by default; `more` are further fields of it."""
    row = Row([1] if prompt_ids is None else prompt_ids, token_ids, rollout_logps=rollout_logps)
    return Sample([row], stop, (version, version), **more)


def make_item(prompt_ids: list[int], token_ids: list[int], advantage: float = 1.0, weight: float = 1.0) -> Item:
    """What the trainer needs of an episode of one row."""
    return Item([Row(prompt_ids, token_ids)], advantage, weight)


def as_group(prompt: Prompt, completions: Iterable[list[int]], advantages: Iterable[float]) -> Group:
    """The group of these completions of a prompt."""
    pairs = zip(completions, advantages, strict=True)
    return Group(prompt, [one_row(tokens, prompt.token_ids, advantage=advantage) for tokens, advantage in pairs])
