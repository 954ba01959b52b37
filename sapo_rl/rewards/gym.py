"""The scorers that the datasets of the package reasoning-gym bring along."""

from __future__ import annotations

import functools
import json
from typing import Any

from sapo_rl.data.gym import create
from sapo_rl.rewards.registry import REWARD_FUNCTIONS, VOTERS, Completion, numbered
from sapo_rl.rewards.text import final_answer, text_of


@REWARD_FUNCTIONS.register_module("reasoning_gym")
def reasoning_gym(
    completions: list[Completion],
    prompts: list[Any],
    answer: list[Any],
    metadata: list[dict[str, Any]],
    gym: list[dict[str, Any]],
    **columns: list[Any],
) -> list[float | None]:
    r"""The score that the prompt's own dataset gives the reply, mostly 0 to 1, with partial credit for near misses.

    The columns are those of `data.source: reasoning_gym`. Scored is the last `<answer>...</answer>` of the reply, else
    its last `\boxed{}`, else what follows `</think>`, else the whole reply. A reply on which the dataset's own parser
    fails scores 0. Some of these parsers evaluate the reply as Python: they belong in the pool's workers only.
    """
    entries = zip(completions, prompts, answer, metadata, gym, strict=True)
    return [
        _score(text_of(completion), {"question": asked, "answer": expected, "metadata": about}, origin)
        for completion, asked, expected, about, origin in entries
    ]


@VOTERS.register_module("reasoning_gym")
def reasoning_gym_votes(completions: list[Completion], **columns: list[Any]) -> list[float]:
    """Number the replies by the text of their answer."""
    return numbered(final_answer(text_of(completion)) or None for completion in completions)


def _score(reply: str, entry: dict[str, Any], origin: dict[str, Any]) -> float:
    dataset = _dataset(origin["dataset"], json.dumps(origin["args"], sort_keys=True))
    try:
        return float(dataset.score_answer(final_answer(reply), entry))
    except Exception:  # several parsers raise whatever they meet on malformed replies; such a reply is a wrong one
        return 0.0


@functools.lru_cache(maxsize=16)
def _dataset(name: str, args: str) -> Any:
    return create(name, json.loads(args), size=1, seed=0)
