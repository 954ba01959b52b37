"""Scores of short answers in words, as SQuAD and HotpotQA are scored."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from typing import Any

from sapo_rl.rewards.registry import REWARD_FUNCTIONS, VOTERS, Completion, numbered
from sapo_rl.rewards.text import final_answer, text_of

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
ALONE = frozenset({"yes", "no", "noanswer"})
"""Answers that count as a whole or not at all."""


@REWARD_FUNCTIONS.register_module("squad_f1")
def squad_f1(completions: list[Completion], answer: list[Any], **columns: list[Any]) -> list[float | None]:
    """Words that the reply shares with the answer: the harmonic mean of their shares of both, from 0 to 1.

    Case, punctuation, articles and white space do not count. A `yes`, `no` or `noanswer` must be the whole reply, as
    HotpotQA has it. Of an answer that is a list the best counts; None where the row has no answer. The reply is what
    `sapo_rl.rewards.text.final_answer` takes of it.
    """
    return _best(completions, answer, f1)


@REWARD_FUNCTIONS.register_module("squad_exact_match")
def squad_exact_match(completions: list[Completion], answer: list[Any], **columns: list[Any]) -> list[float | None]:
    """1 where the reply is the answer but for what `squad_f1` does not count either."""
    return _best(completions, answer, lambda reply, expected: float(normalised(reply) == normalised(expected)))


@VOTERS.register_module("squad_f1")
@VOTERS.register_module("squad_exact_match")
def squad_votes(completions: list[Completion], **columns: list[Any]) -> list[float]:
    """Number the replies by their answer, without what does not count."""
    return numbered(normalised(final_answer(text_of(completion))) or None for completion in completions)


def f1(reply: str, expected: str) -> float:
    """Return the F1 of two texts' words.

    Example:
        >>> f1("It is the Eiffel Tower.", "Eiffel Tower")
        0.6666666666666666
    """
    ours, theirs = normalised(reply), normalised(expected)
    if ours != theirs and {ours, theirs} & ALONE:
        return 0.0
    found, wanted = ours.split(), theirs.split()
    same = (Counter(found) & Counter(wanted)).total()
    return 2 * same / (len(found) + len(wanted)) if same else float(found == wanted)


def normalised(text: str) -> str:
    """Return a text in lower case without punctuation, articles and white space that says nothing."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _best(completions: list[Completion], answers: list[Any], score: Callable[[str, str], float]) -> list[float | None]:
    scores: list[float | None] = []
    for completion, answer in zip(completions, answers, strict=True):
        options = answer if isinstance(answer, list) else [] if answer is None else [answer]
        reply = final_answer(text_of(completion))
        scores.append(max((score(reply, str(option)) for option in options), default=None))
    return scores
