"""Things to explain in a sentence: a task without a right answer, for a judge."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

_THINGS = (
    "a bridge", "a clock", "a compass", "a desert", "a dream", "a fossil", "a glacier", "a lighthouse", "a magnet",
    "a map", "a mirror", "a moon", "a rainbow", "a river", "a rocket", "a seed", "a shadow", "a telescope", "a volcano",
    "a vote", "bread", "electricity", "friendship", "gravity", "ice", "luck", "money", "music", "rain", "sleep",
    "the alphabet", "the sea", "the wind", "thunder", "time", "yeast",
)  # fmt: skip
_LISTENERS = (
    "a five-year-old child", "a farmer", "a judge", "a king of long ago", "a pilot", "a visitor from Mars",
    "somebody in a hurry", "somebody who has never been outdoors",
)  # fmt: skip


def explanations() -> Iterator[dict[str, str]]:
    """Give 288 rows with a `prompt` that asks to explain a `thing` to a `listener`, in an order that mixes both."""
    pairs = itertools.product(range(len(_THINGS)), range(len(_LISTENERS)))
    for place, shift in sorted(pairs, key=lambda pair: (pair[1], pair[0])):
        thing, listener = _THINGS[place], _LISTENERS[(place + shift) % len(_LISTENERS)]
        yield {"prompt": f"Explain {thing} to {listener}, in one sentence.", "thing": thing, "listener": listener}
