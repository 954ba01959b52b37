"""How often prompts are solved: what a rate is worth, what a draw knows of it, and going on with it."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import one_row

from sapo_rl.config.data import DataConfig, PassRateConfig
from sapo_rl.data import PromptSampler
from sapo_rl.data.pass_rates import PassRates, fingerprint, pass_rates_of, read_pass_rates, worth, write_pass_rates
from sapo_rl.data.weighted import Sampler, WeightedSampler, build_sampler
from sapo_rl.errors import UserError
from sapo_rl.types import Group, PassRate, Prompt


def config(sampling: str = "pass_rate", **rates: Any) -> DataConfig:
    return DataConfig(source="file", sampling=sampling, pass_rate=PassRateConfig(**rates))


def known(rates: list[float], cfg: DataConfig, samples: int = 16, lag: int = 0) -> PassRates:
    found = PassRates(len(rates), cfg, lag)
    found.begin_with([PassRate(place, rate, samples) for place, rate in enumerate(rates) if not math.isnan(rate)])
    return found


def test_a_rate_is_worth_the_variance_of_its_rewards_and_most_at_the_target() -> None:
    rates = np.array([0.0, 0.25, 0.5, 0.75, 1.0, np.nan])
    assert worth(rates, 0.5).tolist() == [0.0, 0.75, 1.0, 0.75, 0.0, 1.0]
    # (0.5 / 0.25)^0.5 (0.5 / 0.75)^1.5 and (0.75 / 0.25)^0.5 (0.25 / 0.75)^1.5
    assert worth(rates, 0.25) == pytest.approx([0.0, 1.0, math.sqrt(2) * (2 / 3) ** 1.5, 1 / 3, 0.0, 1.0])


@given(st.floats(0.01, 0.99), st.integers(0, 64))
def test_nothing_is_worth_more_than_the_target(target: float, solved: int) -> None:
    rate = solved / 64
    at, there = worth(np.array([target, rate]), target)
    assert at == pytest.approx(1) and 0 <= there <= 1 + 1e-12
    assert worth(np.array([1 - rate]), 1 - target)[0] == pytest.approx(there)  # the mirror image


def test_the_floor_and_the_filter_hold_for_each_sampling() -> None:
    rates = [0.0, 0.5, 0.75, 1.0, math.nan]
    assert known(rates, config()).weights().tolist() == [0.05, 1.0, 0.75, 0.05, 1.0]
    assert known(rates, config(high=0.75)).weights().tolist() == [0.05, 1.0, 0.05, 0.05, 1.0]
    assert known(rates, config(high=0.75), samples=15).weights().tolist() == [0.05, 1.0, 0.75, 0.05, 1.0]
    assert known(rates, config("uniform", low=0.0, floor=0.1)).weights().tolist() == [0.1, 1.0, 1.0, 1.0, 1.0]
    assert known(rates, config("uniform")).weights().tolist() == [1.0] * 5


def test_a_rate_is_the_mean_of_the_last_two_groups_and_the_metrics_are_those_of_known_prompts() -> None:
    rates = PassRates(8, config())
    assert rates.metrics() == {"data/effective_prompts": 8.0, "data/known_fraction": 0.0}
    rates.record(1, [PassRate(0, 0.0, 4), PassRate(1, 1.0, 4), PassRate(2, 0.5, 4)])
    rates.record(2, [PassRate(0, 0.5, 4), PassRate(3, 0.25, 3)])
    rates.record(3, [PassRate(0, 1.0, 4), PassRate(0, 0.5, 4)])  # twice in a step
    found, samples = rates.at(4)
    assert found[:4].tolist() == [0.75, 1.0, 0.5, 0.25] and np.isnan(found[4:]).all()
    assert samples.tolist() == [16, 4, 4, 3, 0, 0, 0, 0]
    weights = [0.75, 0.05, 1.0, 0.75, 1, 1, 1, 1]
    assert rates.metrics() == pytest.approx(
        {
            "data/effective_prompts": sum(weights) ** 2 / sum(one**2 for one in weights),
            "data/known_fraction": 0.5,
            "data/pass_rate_mean": (0.75 + 1 + 0.5 + 0.25) / 4,
            "data/always_solved_fraction": 0.25,
            "data/never_solved_fraction": 0.0,
        }
    )


def test_prompts_are_drawn_in_proportion_to_their_weights_and_once_a_step() -> None:
    rates = known([0.5, 0.5, 0.75, 0.0, 1.0, math.nan], config(floor=0.25))
    sampler = build_sampler(config(floor=0.25), rates, 6, 1, seed=0)
    counts = Counter(place for step in range(8000) for place in sampler.next(step))
    weights = np.array([1, 1, 0.75, 0.25, 0.25, 1])
    assert [counts[place] / 8000 for place in range(6)] == pytest.approx((weights / weights.sum()).tolist(), abs=0.015)
    sampler = build_sampler(config(floor=0.25), rates, 6, 4, seed=0)
    for step in range(100):
        drawn = sampler.next(step)
        further = sampler.further(drawn, 5, step)
        assert sorted(drawn + further) == list(range(6)) and drawn == sampler.next(step)
    assert sampler.next(1) != build_sampler(config(), rates, 6, 4, seed=1).next(1)
    every = build_sampler(config(), rates, 6, 15, seed=0).next(1)
    assert Counter(Counter(every).values()) == {2: 3, 3: 3}  # twice through all, and half of them once more


def test_the_filter_lets_held_back_prompts_through_now_and_then_and_no_others_are_lost() -> None:
    cfg = config("uniform", low=0.0, high=1.0, floor=0.125)
    rates = known([0.0, 1.0] * 20 + [0.5] * 10, cfg)
    sampler = build_sampler(cfg, rates, 50, 5, seed=0)
    assert isinstance(sampler, PromptSampler)
    drawn: list[int] = []
    for step in range(1, 4000):
        drawn += sampler.next(step)
    counts = Counter(drawn)
    epochs = sampler.epoch
    assert all(epochs <= counts[place] <= epochs + 1 for place in range(40, 50))
    held = sum(counts[place] for place in range(40))
    assert held / (40 * epochs) == pytest.approx(0.125, rel=0.05)
    assert set(sampler.further([40], 50, 1)) == set(range(41, 50))


def results(step: int, drawn: list[int]) -> list[PassRate]:
    """What groups might say: any rate, the same each time."""
    return [PassRate(place, (place * 7 + step * 3) % 5 / 4, 8) for place in drawn]


class Run:
    """Draws and records as `BatchQueue` does: `ahead` batches are begun beyond the one that is trained on."""

    def __init__(self, cfg: DataConfig, ahead: int, state: Any = None, step: int = 0) -> None:
        self.ahead, self.begun, self.step = ahead, step, step
        self.rates = PassRates(12, cfg, ahead)
        self.sampler: Sampler = build_sampler(cfg, self.rates, 12, 3, seed=1)
        self.drawn: dict[int, list[int]] = {}
        self.states: dict[int, Any] = {}
        if state:
            self.sampler.load_state_dict(state["sampler"])
            self.rates.load_state_dict(state["rates"])

    def take(self) -> list[int]:
        self.step += 1
        while self.begun < self.step + self.ahead:
            self.begun += 1
            self.drawn[self.begun] = drawn = self.sampler.next(self.begun)
            drawn += self.sampler.further(drawn, 2, self.begun)
            self.states[self.begun] = self.sampler.state_dict()
        self.rates.record(self.step, results(self.step, self.drawn[self.step]))
        return self.drawn[self.step]

    def state(self) -> Any:
        found = {"sampler": self.states[self.step], "rates": self.rates.state_dict()}
        return json.loads(json.dumps(found))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["uniform", "pass_rate"]), st.integers(0, 3), st.integers(1, 12))
def test_a_resumed_run_draws_the_same_prompts_however_many_batches_are_ahead(
    sampling: str, ahead: int, stop: int
) -> None:
    cfg = config(sampling, low=0.0, high=0.9, min_samples=8)
    whole = Run(cfg, ahead)
    first = [whole.take() for _ in range(stop)]
    state = whole.state()
    rest = [whole.take() for _ in range(12)]
    resumed = Run(cfg, ahead, state, stop)
    assert [resumed.take() for _ in range(12)] == rest
    assert resumed.state() == whole.state()
    assert len({tuple(drawn) for drawn in first + rest}) > 1


def test_what_a_draw_knows_does_not_depend_on_what_is_finished() -> None:
    early, late = PassRates(2, config(), lag=2), PassRates(2, config(), lag=2)
    early.record(1, [PassRate(0, 1.0, 4)])
    assert np.isnan(early.at(3)[0]).all()
    assert early.at(4)[0][0] == 1 == early.at()[0][0]
    for step, rate in ((1, 1.0), (2, 0.0), (3, 0.0)):
        late.record(step, [PassRate(0, rate, 4)])
    assert late.at(4)[0][0] == 1 and late.at(5)[0][0] == 0.5 and late.at(6)[0][0] == 0


def test_a_sampler_of_other_prompts_cannot_be_resumed() -> None:
    rates = PassRates(5, config())
    state = WeightedSampler(5, 2, 0, rates.weights).state_dict()
    with pytest.raises(UserError, match="num_prompts=5, now 6"):
        WeightedSampler(6, 2, 0, rates.weights).load_state_dict(state)
    with pytest.raises(UserError, match="seed=0, now 1"):
        WeightedSampler(5, 2, 1, rates.weights).load_state_dict(state)


def test_a_group_is_solved_by_the_reward_that_is_named() -> None:
    groups = [
        Group(Prompt(index, [1], "Q?", {}), [one_row([0], rewards={"a": a, "a/b": 2.0}) for a in rewards])
        for index, rewards in enumerate(([1.0, 0.9, None, 1.0], [None, None], []))
    ]
    assert pass_rates_of(groups, "a", 1.0) == [2 / 3, None, None]
    assert pass_rates_of(groups, "a", 0.9) == [1.0, None, None]
    assert pass_rates_of(groups, "a/b", 1.0) == [1.0, 1.0, None]
    with pytest.raises(UserError, match=r"data\.pass_rate\.reward: no function returns 'a/c'; did you mean 'a/b'\?"):
        pass_rates_of(groups, "a/c", 1.0)


def test_a_file_of_rates_finds_its_prompts_whatever_their_order(tmp_path: Path) -> None:
    contents = ["one", [{"role": "user", "content": "two ü \ud800"}], "three", "one"]
    marks = [fingerprint(content) for content in contents]
    assert len(set(marks)) == 3
    path = tmp_path / "run" / "pass_rates.parquet"
    path.parent.mkdir()
    columns = {"fingerprint": [marks[1], "else", marks[0]], "pass_rate": [0.25, 1.0, 0.5], "samples": [8, 8, 4]}
    write_pass_rates(path, columns)
    expected = [PassRate(0, 0.5, 4), PassRate(1, 0.25, 8), PassRate(3, 0.5, 4)]
    assert read_pass_rates(str(path), contents) == expected == read_pass_rates(str(path.parent), contents)
    with pytest.raises(UserError, match="knows none of the 1 prompts"):
        read_pass_rates(str(path), ["three"])
    other = tmp_path / "other.jsonl"
    for row in (
        {"prompt": "one"},
        {"fingerprint": "x", "pass_rate": 1.5, "samples": 1},
        {"pass_rate": 1, "samples": 0},
    ):
        other.write_text(json.dumps(row))
        with pytest.raises(UserError, match=r"data\.pass_rate\.path: .*holds no pass rates \(columns fingerprint,"):
            read_pass_rates(str(other), contents)
