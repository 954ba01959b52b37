"""Which prompts are a rank's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One rank's part of a list that all ranks hold.

    Example:
        >>> Share.of_rank(1, ranks=2, sharing=1).of(["a", "b", "c", "d"])
        ['c', 'd']
    """

    index: int
    count: int
    """Parts; 0 where this rank has none, because it lends its GPU to the engine of another."""

    @classmethod
    def of_rank(cls, rank: int, ranks: int, sharing: int) -> Share:
        """Return the share of a rank where each `sharing` neighbouring ranks have one engine together."""
        index, lent = divmod(rank, sharing)
        return cls(index, 0 if lent else ranks // sharing)

    def of(self, items: Sequence[T]) -> list[T]:
        """Return this rank's items."""
        if not self.count:
            return []
        return list(items[self.index * len(items) // self.count : (self.index + 1) * len(items) // self.count])
