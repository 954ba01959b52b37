"""From rewards to the numbers of an evaluation, and how sure they are: pure functions on plain lists.

A prompt has n samples. Prompts are drawn from a population and samples of a prompt resemble each other, so every
interval is over prompts: the samples of one are a cluster (Miller 2024, arXiv 2411.00640).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = statistics.NormalDist().inv_cdf(0.975)
"""Standard deviations of a normal distribution within which 95% of it lie."""


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95% interval.

    Example:
        >>> estimate([1.0] * 8 + [0.0] * 2)
        Estimate(value=0.8, low=0.4901624715496155, high=0.9433178485456247, prompts=10)
    """

    value: float
    low: float
    high: float
    prompts: int
    """How many it is the mean over."""


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Return the chance that at least one of `k` samples passes that are drawn out of `n`, of which `passed` do.

    1 - C(n - passed, k) / C(n, k), which is unbiased whatever n is (Chen et al. 2021, arXiv 2107.03374).

    Raises:
        ValueError: more samples are to be drawn, or have passed, than there are.

    Example:
        >>> pass_at_k(4, passed=1, k=2)
        0.5
    """
    if not 1 <= k <= n or not 0 <= passed <= n:
        raise ValueError(f"needs 1 <= k <= n and 0 <= passed <= n, got n={n}, passed={passed}, k={k}")
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def ks_of(samples: int) -> list[int]:
    """Return the k above 1 for which pass@k is told: the powers of two up to `samples`, and `samples`."""
    return sorted({2**power for power in range(1, samples.bit_length()) if 2**power <= samples} | {samples} - {0, 1})


def majority(votes: Sequence[float | None], rewards: Sequence[float]) -> float:
    """Return what the most frequent answer earns; among answers that are equally frequent, their mean.

    Args:
        votes: of each sample the number of its answer, the same for answers that are equal; 0 or None where it has
            none, and does not vote.
        rewards: of each sample.

    Returns:
        The mean reward of the samples with that answer; 0 where no sample has an answer.

    Example:
        >>> majority([1, 1, 2], [0.0, 0.0, 1.0])
        0.0
    """
    earned: dict[float, list[float]] = {}
    for vote, reward in zip(votes, rewards, strict=True):
        if vote:
            earned.setdefault(vote, []).append(reward)
    most = max(map(len, earned.values()), default=0)
    return statistics.fmean([statistics.fmean(own) for own in earned.values() if len(own) == most] or [0.0])


def estimate(scores: Sequence[float], samples: int = 1) -> Estimate:
    """Return the mean of one score a prompt with its 95% interval.

    For scores from 0 to 1 it is Wilson's interval (1927) at the effective sample size p (1 - p) / v, where v is the
    variance of the mean as the prompts show it (Korn and Graubard 1998): for scores that are 0 or 1 that size is the
    number of prompts, and it is at most the number of all samples. For other scores it is the mean -/+ 1.96 standard
    errors.

    Args:
        scores: at least one.
        samples: how many each is made of.
    """
    count, mean = len(scores), statistics.fmean(scores)
    squares = math.fsum((score - mean) ** 2 for score in scores)
    if min(scores) < 0 or max(scores) > 1:
        half = Z95 * math.sqrt(squares / max(1, count - 1) / count)
        return Estimate(mean, mean - half, mean + half, count)
    variance, spread = squares / count**2, mean * (1 - mean)
    size = min(spread / variance, count * samples) if variance > 0 else count * (samples if spread > 0 else 1)
    return Estimate(mean, *wilson(mean, size), count)


def change(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Return by how much the mean of one score a prompt has changed, with its 95% interval.

    The differences on the same prompts, -/+ 1.96 standard errors of their mean: what makes prompts easy or hard for
    both models does not count.

    Args:
        before: at least one.
        after: those of the same prompts.
    """
    differences = [new - old for old, new in zip(before, after, strict=True)]
    count, mean = len(differences), statistics.fmean(differences)
    half = Z95 * math.sqrt(math.fsum((one - mean) ** 2 for one in differences) / max(1, count - 1) / count)
    return Estimate(mean, mean - half, mean + half, count)


def wilson(share: float, size: float) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share among `size` independent trials."""
    z2 = Z95**2
    middle = (share + z2 / (2 * size)) / (1 + z2 / size)
    half = Z95 / (1 + z2 / size) * math.sqrt(share * (1 - share) / size + z2 / (4 * size**2))
    return max(0.0, middle - half), min(1.0, middle + half)
