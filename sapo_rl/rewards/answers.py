"""What a judge has said of replies, as numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sapo_rl.rewards.text import last_number


@dataclass(frozen=True)
class Reading:
    """How an answer becomes rewards.

    Example:
        >>> Reading(0, 10, None, None, False).rewards("It is right, but long: 8/10", 1)
        [0.8]
    """

    low: float
    high: float
    choices: Mapping[str, float] | None
    field: str | None
    together: bool

    def rewards(self, text: str, count: int) -> list[float]:
        """Return what an answer says of `count` replies asked about together, or of one.

        Raises:
            ValueError: nothing that could be read.
        """
        if self.choices is not None:
            words = "|".join(map(re.escape, sorted(self.choices, key=len, reverse=True)))
            found = re.findall(rf"(?<!\w)(?:{words})(?!\w)", text)
            if not found:
                raise ValueError(f"the judge's answer holds none of {', '.join(self.choices)}: {_end(text)}")
            return [float(self.choices[found[-1]])]
        if self.together:
            values = _last_json(text, "[", lambda one: isinstance(one, list) and len(one) == count)
            return [self._share(value, text) for value in values]
        if self.field is not None:
            return [self._share(_last_json(text, "{", lambda one: self.field in one)[self.field], text)]
        best = rf"(?<=[\d*])\s*(?:/|out of)\s*{re.escape(f'{self.high:g}')}(?!\d)"  # of "8/10"
        return [self._share(last_number(re.sub(best, "", text, flags=re.IGNORECASE)), text)]

    def _share(self, value: Any, text: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not self.low <= number <= self.high:
            raise ValueError(f"the judge's answer has no number from {self.low:g} to {self.high:g}: {_end(text)}")
        return (number - self.low) / (self.high - self.low)


def _last_json(text: str, opening: str, wanted: Any) -> Any:
    """The last list or object of JSON in a text that is what is wanted."""
    decoder = json.JSONDecoder()
    for start in reversed([place.start() for place in re.finditer(re.escape(opening), text)]):
        try:
            found, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if wanted(found):
            return found
    raise ValueError(f"the judge's answer does not end in the JSON that was asked for: {_end(text)}")


def _end(text: str) -> str:
    return repr(text[-120:])
