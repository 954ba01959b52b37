"""Rewards to advantages: by hand, against statistics, and what must hold for any rewards (hypothesis)."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import one_row

from sapo_rl.advantages import BASELINES, COMBINES, SCALES, advantages, own_function, with_advantages, zero_spread
from sapo_rl.config import RewardFunctionConfig
from sapo_rl.config.loss import AdvantageConfig
from sapo_rl.errors import UserError
from sapo_rl.types import Batch, Group, Prompt, RewardStats, Sample, Usage

Rewards = list[list[list[float | None]]]
EPS = 1e-6


def single(*groups: list[float | None]) -> Rewards:
    """Groups of rewards by one function."""
    return [[[reward] for reward in group] for group in groups]


def of_group(rewards: list[float | None], **options: str) -> list[float]:
    """Advantages of one group with one reward function."""
    return advantages(single(rewards), [1.0], **options)[1][0]


ordinary = st.lists(st.integers(-1000, 1000).map(lambda n: n / 8), min_size=2, max_size=12)
anything = st.lists(
    st.one_of(
        st.none(),
        st.floats(-1e307, 1e307),
        st.floats(-1e-300, 1e-300),
        st.sampled_from([0.0, 1.0, 1e300, -1e300, 5e-324, 1e-320]),
    ),
    max_size=10,
)
scales = pytest.mark.parametrize("scale", SCALES)
baselines = pytest.mark.parametrize("baseline", BASELINES)
combines = pytest.mark.parametrize("combine", COMBINES)


def test_group_scale_is_the_z_score_with_bessels_correction() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0, 0.5]
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    assert of_group(rewards) == pytest.approx([(r - mean) / (std + EPS) for r in rewards], rel=1e-14)


def test_none_scale_keeps_the_rewards_unit() -> None:
    assert of_group([4.0, 1.0, 1.0], scale="none") == pytest.approx([2.0, -1.0, -1.0], rel=1e-14)


def test_leave_one_out_subtracts_the_mean_of_the_others() -> None:
    rewards = [4.0, 1.0, 2.0, 9.0]
    others = [statistics.mean(rewards[:g] + rewards[g + 1 :]) for g in range(4)]
    expected = [r - b for r, b in zip(rewards, others, strict=True)]
    assert of_group(rewards, scale="none", baseline="leave_one_out") == pytest.approx(expected, rel=1e-14)


def test_batch_scale_divides_by_the_deviation_of_all_rewards() -> None:
    groups = [[1.0, 0.0, 2.0], [5.0, 5.0, 8.0]]
    std = statistics.stdev(groups[0] + groups[1])
    _, found = advantages(single(*groups), [1.0], scale="batch")
    for group, advantages_G in zip(groups, found, strict=True):
        expected = [(r - statistics.mean(group)) / (std + EPS) for r in group]
        assert advantages_G == pytest.approx(expected, rel=1e-14)


@combines
def test_batch_scale_over_ranks_is_that_of_one_process(combine: str) -> None:
    everything: Rewards = [[[1.0, 0.5], [0.0, None]], [[5.0, 1.0], [2.0, 0.0]], [[3.0, 2.0], [None, 7.0]]]
    options = {"scale": "batch", "combine": combine}
    _, whole = advantages(everything, [1.0, 2.0], **options)
    _, first = advantages(everything[:1], [1.0, 2.0], **options, batch_P_G_R=everything)
    _, rest = advantages(everything[1:], [1.0, 2.0], **options, batch_P_G_R=everything)
    assert first + rest == whole


def test_a_missing_reward_gets_no_advantage_and_leaves_the_others_alone() -> None:
    found = of_group([1.0, None, 0.0, 0.5])
    without = of_group([1.0, 0.0, 0.5])
    assert found == [without[0], 0.0, *without[1:]]


def test_rewards_are_weighted_sums_of_those_that_apply() -> None:
    rewards, _ = advantages([[[1.0, 0.5], [None, 2.0], [None, None], [3.0, None]]], [2.0, -1.0])
    assert rewards == [[1.5, -2.0, None, 6.0]]


def test_sum_normalises_the_sum() -> None:
    rewards: Rewards = [[[1.0, 10.0], [0.0, 30.0], [1.0, 50.0]]]
    assert advantages(rewards, [1.0, 0.1])[1] == advantages(single([2.0, 3.0, 6.0]), [1.0])[1]


def test_normalize_gives_every_function_its_weight_whatever_its_spread() -> None:
    first, second = [1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 900.0, 100.0]
    rewards: Rewards = [[list(pair) for pair in zip(first, second, strict=True)]]
    sums, found = advantages(rewards, [1.0, 0.5], combine="normalize")
    expected = [a + 0.5 * b for a, b in zip(of_group(first), of_group(second), strict=True)]
    assert found[0] == pytest.approx(expected, rel=1e-14)
    assert sums[0] == [1.0, 0.0, 450.0, 51.0]


def test_normalize_sees_differences_that_the_sum_hides() -> None:
    rewards: Rewards = [[[1.0, 0.0], [0.0, 2.0], [0.0, 2.0], [0.5, 1.0]]]
    sums, found = advantages(rewards, [2.0, 1.0], combine="normalize")
    assert zero_spread(sums) == [True] and zero_spread(found) == [False]
    # 2 z - z, since the second reward is the first one upside down
    assert found[0] == pytest.approx(of_group([1.0, 0.0, 0.0, 0.5]), rel=1e-5)


@scales
@baselines
@combines
@pytest.mark.parametrize("group", [[0.7] * 4, [0.1 + 0.2, 0.3, 0.3], [1e300] * 3, [5e-324] * 2, [3.0], [], [None, 2.0]])
def test_groups_without_spread_get_exactly_zero(
    scale: str, baseline: str, combine: str, group: list[float | None]
) -> None:
    rewards = single(group, [0.0, 1.0])
    sums, found = advantages(rewards, [1.0], scale=scale, baseline=baseline, combine=combine)
    assert found[0] == [0.0] * len(group)
    assert zero_spread(sums) == [True, False]
    assert found[1][0] < 0 < found[1][1]


def test_spread_is_judged_relative_to_the_rewards() -> None:
    small = [0.0, 1e-12, 2e-12]
    assert zero_spread([small, [1.0 + value for value in small]]) == [False, True]


@scales
@baselines
@given(rewards=ordinary)
def test_advantages_of_a_group_sum_to_zero(scale: str, baseline: str, rewards: list[float]) -> None:
    found = of_group(rewards, scale=scale, baseline=baseline)
    assert math.fsum(found) == pytest.approx(0, abs=1e-12 * (1 + sum(map(abs, found))))


@baselines
@given(rewards=ordinary, shift=st.integers(-100, 100), factor=st.sampled_from([0.5, 2.0, 1024.0]))
def test_advantages_are_invariant_to_shifting_and_scaling(
    baseline: str, rewards: list[float], shift: int, factor: float
) -> None:
    def standard(values: list[float]) -> list[float]:
        return advantages(single(values), [1.0], baseline=baseline, eps=1e-300)[1][0]

    moved = standard([factor * reward + shift for reward in rewards])
    assert moved == pytest.approx(standard(rewards), rel=1e-9, abs=1e-9)


@scales
@baselines
@combines
@given(groups=st.lists(anything, max_size=4))
def test_advantages_are_finite_for_constant_huge_and_tiny_rewards(
    scale: str, baseline: str, combine: str, groups: list[list[float | None]]
) -> None:
    sums, found = advantages(single(*groups), [1.0], scale=scale, baseline=baseline, combine=combine)
    assert sums == groups
    assert all(math.isfinite(value) for group in found for value in group)
    for group, values in zip(groups, found, strict=True):
        assert all(value == 0 for reward, value in zip(group, values, strict=True) if reward is None)
        assert not (zero_spread([group])[0] and any(values))


@given(rewards=ordinary)
def test_better_rewards_have_better_advantages(rewards: list[float]) -> None:
    pairs = sorted(zip(rewards, of_group(rewards), strict=True))
    assert [value for _, value in pairs] == sorted(value for _, value in pairs)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused_with_its_place(bad: float) -> None:
    with pytest.raises(ValueError, match="sample 1 of prompt 2"):
        advantages(single([0.0, 1.0], [0.0, 1.0], [0.0, bad]), [1.0])


def test_options_and_weights_that_do_not_fit_are_refused() -> None:
    for option, known in (("scale", SCALES), ("baseline", BASELINES), ("combine", COMBINES)):
        with pytest.raises(ValueError, match=", ".join(known)):
            of_group([0.0, 1.0], **{option: "other"})
    with pytest.raises(ValueError, match=r"1 reward\(s\) for 2 weights"):
        advantages(single([0.0, 1.0]), [1.0, 2.0])


OWN = """
import statistics

def median(rewards, scale: float = 1.0):
    middle = statistics.median(reward for reward in rewards if reward is not None)
    return [0.0 if reward is None else (reward - middle) * scale for reward in rewards]

def short(rewards): return [1.0]
def infinite(rewards): return [float("inf") for _ in rewards]
def nothing(rewards): return None
def words(rewards): return ["1", "2", "3"]
def fails(rewards): return rewards[0] / 0
def empty(): return []
in_c = max
number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_advantages.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_advantages", raising=False)


def batch_of(samples: list[Sample]) -> Batch:
    return Batch([Group(Prompt(0, [1], "q", {}), samples)], RewardStats({}, {}, {}), {}, Usage([], 0.0))


def scored(function: str, **args: float) -> list[Sample]:
    """A group of three, the last of which no reward applies to, after `function`."""
    samples = [one_row([1], rewards={"f": reward, "g": half}) for reward, half in [(3, 2), (1, 0), (None, None)]]
    functions = {"f": RewardFunctionConfig(weight=1.0), "g": RewardFunctionConfig(weight=0.5)}
    settings = AdvantageConfig(name=f"own_advantages.{function}", args=args)
    batch = with_advantages(batch_of(samples), functions, settings, lambda values: values)
    assert all(sample.advantage == 0.0 and sample.reward is None for sample in samples)  # new samples have them
    return batch.groups[0].samples


def test_a_function_of_ones_own_makes_advantages_of_weighted_rewards(own: None) -> None:
    settings, flat = AdvantageConfig(name="own_advantages.fails"), batch_of([one_row([1], rewards={"f": None})])
    (found,) = with_advantages(flat, {"f": RewardFunctionConfig()}, settings, lambda one: one).groups[0].samples
    assert (found.reward, found.advantage) == (None, 0.0)
    samples = scored("median", scale=2.0)
    assert [sample.reward for sample in samples] == [4.0, 1.0, None]
    assert [sample.advantage for sample in samples] == [3.0, -3.0, 0.0]


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("short", r"'own_advantages.short' must return 3 finite numbers.*\[4.0, 1.0, None\] it returned \[1.0\]"),
        ("infinite", r"returned \[inf, inf, inf\]"),
        ("nothing", "returned None"),
        ("words", r"returned \['1', '2', '3'\]"),
        ("in_c", r"'own_advantages.in_c' failed on the rewards .*: TypeError: '>' not supported between"),
        ("fails", "'own_advantages.fails' failed on the rewards .*: ZeroDivisionError: "),
    ],
)
def test_what_a_function_of_ones_own_returns_is_checked(own: None, function: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        scored(function)


@pytest.mark.parametrize(
    ("function", "args", "told"),
    [
        ("median", {"scael": 1}, "advantage.args.scael: unknown argument; did you mean 'scale'"),
        ("median", {"scale": "a"}, "advantage.args.scale: 'a' is a str, must be float"),
        ("empty", {}, "advantage.name: 'own_advantages.empty' must take a group's rewards first"),
        ("number", {}, "advantage.name: 'own_advantages.number' is a int, not a function"),
        ("medain", {}, "advantage.name: .*has no 'medain'; did you mean 'median'"),
    ],
)
def test_the_signature_of_a_function_of_ones_own_is_checked(own: None, function: str, args: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        own_function(AdvantageConfig(name=f"own_advantages.{function}", args=args))
