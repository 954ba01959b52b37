"""Who meets whom where replies are compared by twos, and what follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from sapo_rl.rewards.registry import Score


def games(count: int, most: int) -> list[tuple[int, int]]:
    """Return pairs of `count` replies: the first of a tournament in which each meets every other one once.

    They are `most`, or so many that each reply is in one where that is more. All replies are in about equally many.

    Example:
        >>> games(4, 2)
        [(0, 3), (1, 2)]
    """
    # In round r those meet whose numbers add up to r, modulo an odd number; the one left over meets the last reply.
    odd = count - 1 + count % 2
    meetings = (
        (one, count - 1 if one == other else other)
        for turn in range(odd)
        for one in range(odd)
        if one <= (other := (turn - one) % odd) and (one != other or count % 2 == 0)
    )
    return [pair for pair, _ in zip(meetings, range(max(most, (count + 1) // 2)), strict=False)]


def victories(
    count: int, pairs: Sequence[tuple[int, int]], verdicts: Sequence[tuple[float | None, float | None]]
) -> list[Score]:
    """Return each reply's share of victories, and how far the two verdicts on its pairs agree; None without a pair.

    Args:
        count: replies.
        pairs: those that were compared.
        verdicts: for each pair how far the first shown is better, from 0 to 1: as the pair is, and turned round. A pair
            with one that could not be read is left out.

    Example:
        >>> victories(2, [(0, 1)], [(1.0, 0.5)])  # the first reply wins, and has a tie where it is shown second
        [{'score': 0.75, 'consistency': 0.5}, {'score': 0.25, 'consistency': 0.5}]
    """
    won: list[list[float]] = [[] for _ in range(count)]
    agreed: list[list[float]] = [[] for _ in range(count)]
    for (one, other), (ahead, turned) in zip(pairs, verdicts, strict=True):
        if ahead is None or turned is None:
            continue
        share, agreement = (ahead + 1 - turned) / 2, 1 - abs(ahead - (1 - turned))
        won[one].append(share)
        won[other].append(1 - share)
        agreed[one].append(agreement)
        agreed[other].append(agreement)
    return [
        {"score": statistics.fmean(shares), "consistency": statistics.fmean(agreements)} if shares else None
        for shares, agreements in zip(won, agreed, strict=True)
    ]
