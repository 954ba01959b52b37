"""The numbers of an evaluation, against others that come about in another way."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_rl.evaluation.scores import estimate, ks_of, majority, pass_at_k, wilson


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_with_one_that_passes(n: int) -> None:
    for passed, k in itertools.product(range(n + 1), range(1, n + 1)):
        choices = list(itertools.combinations([True] * passed + [False] * (n - passed), k))
        assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_is_as_the_product_of_the_paper_s_code_has_it() -> None:
    # Chen et al. compute 1 - prod(1 - k / i) for i from n - c + 1 to n.
    for n, passed, k in ((200, 13, 1), (200, 13, 10), (200, 13, 100), (1000, 3, 500)):
        assert pass_at_k(n, passed, k) == pytest.approx(
            1 - math.prod(1 - k / i for i in range(n - passed + 1, n + 1)), rel=1e-12
        )


@pytest.mark.parametrize(("n", "passed", "k"), [(3, 1, 4), (3, 4, 1), (3, 1, 0), (3, -1, 1)])
def test_pass_at_k_refuses_what_cannot_be(n: int, passed: int, k: int) -> None:
    with pytest.raises(ValueError, match="needs 1 <= k <= n"):
        pass_at_k(n, passed, k)


def test_k_are_the_powers_of_two_and_the_number_of_samples() -> None:
    assert [ks_of(n) for n in (0, 1, 2, 3, 8, 12)] == [[], [], [2], [2, 3], [2, 4, 8], [2, 4, 8, 12]]


def test_the_majority_earns_what_its_answer_does_and_a_tie_the_mean() -> None:
    assert majority([1, 2, 2], [1.0, 0.0, 0.0]) == 0.0
    assert majority([1, 2, 2], [0.0, 1.0, 1.0]) == 1.0
    assert majority([1, 2, 2, 1], [0.0, 1.0, 1.0, 0.0]) == 0.5
    assert majority([1, 2, 3], [0.0, 1.0, 0.0]) == pytest.approx(1 / 3)
    assert majority([0, None, 0, 5], [0.0, 0.0, 0.0, 1.0]) == 1.0  # those without an answer are no majority
    assert majority([0, None], [0.0, 0.0]) == 0.0


def solved(share: float, size: int, outer: float) -> float:
    """Where |p - share| is 1.96 standard deviations of a share among `size` trials, between `outer` and the share."""
    inner = share
    for _ in range(100):
        middle = (inner + outer) / 2
        within = abs(middle - share) < 1.959963984540054 * math.sqrt(middle * (1 - middle) / size)
        inner, outer = (middle, outer) if within else (inner, middle)
    return inner


@pytest.mark.parametrize(("passed", "count"), [(8, 10), (0, 30), (30, 30), (250, 500)])
def test_scores_of_0_and_1_have_wilson_s_interval(passed: int, count: int) -> None:
    found = estimate([1.0] * passed + [0.0] * (count - passed))
    assert (found.value, found.prompts) == (passed / count, count)
    assert found.low == pytest.approx(solved(passed / count, count, 0.0))
    assert found.high == pytest.approx(solved(passed / count, count, 1.0))


def test_samples_that_all_agree_say_no_more_than_one_does() -> None:
    one = [1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    assert estimate(one, samples=16) == estimate(one)


def test_samples_that_differ_within_prompts_narrow_the_interval_to_that_of_so_many_prompts_at_most() -> None:
    apart = estimate([0.0, 0.5, 0.5, 1.0], samples=4)  # the variance of their mean is 0.5 / 16, of one sample 0.25
    assert (apart.low, apart.high) == wilson(0.5, 8)
    alike = estimate([0.5] * 4, samples=4)
    assert (alike.low, alike.high) == wilson(0.5, 16)


def test_scores_beyond_0_and_1_have_the_normal_interval() -> None:
    scores = [-1.0, 0.5, 3.0, 2.5]
    found = estimate(scores)
    half = 1.959964 * statistics.stdev(scores) / 2
    assert (found.low, found.high) == (pytest.approx(1.25 - half), pytest.approx(1.25 + half))
    assert (estimate([2.0]).low, estimate([2.0]).high) == (2.0, 2.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(1, 8))
def test_an_interval_holds_its_value_and_stays_within_0_and_1(scores: list[float], samples: int) -> None:
    found = estimate(scores, samples)
    assert 0 <= found.low <= found.value + 1e-12 and found.value - 1e-12 <= found.high <= 1


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(0)
    held = 0
    for _ in range(1000):
        chances = [rng.betavariate(0.5, 1.5) for _ in range(40)]  # prompts differ; the mean of all is 0.25
        scores = [sum(rng.random() < chance for _ in range(4)) / 4 for chance in chances]
        found = estimate(scores, samples=4)
        held += found.low <= 0.25 <= found.high
    assert 0.92 < held / 1000 < 0.98
