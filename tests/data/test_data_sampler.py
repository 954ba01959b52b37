"""The order of prompts, and going on with it."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_rl.data import PromptSampler, repetition_warning
from sapo_rl.errors import UserError

SIZES = {"num_prompts": st.integers(1, 30), "per_step": st.integers(1, 40), "seed": st.integers(0, 5)}


@settings(deadline=None)
@given(**SIZES)
def test_every_epoch_holds_every_prompt_once(num_prompts: int, per_step: int, seed: int) -> None:
    sampler = PromptSampler(num_prompts, per_step, seed, shuffle=True)
    drawn: list[int] = []
    while len(drawn) < 3 * num_prompts:
        step = sampler.next(1)
        assert len(step) == per_step
        drawn += step
    for epoch in range(3):
        assert sorted(drawn[epoch * num_prompts : (epoch + 1) * num_prompts]) == list(range(num_prompts))


@settings(deadline=None)
@given(**SIZES, before=st.integers(0, 12), shuffle=st.booleans())
def test_a_resumed_sampler_goes_on_exactly(
    num_prompts: int, per_step: int, seed: int, before: int, shuffle: bool
) -> None:
    first = PromptSampler(num_prompts, per_step, seed, shuffle)
    for _ in range(before):
        first.next(1)
    state = json.loads(json.dumps(first.state_dict()))
    second = PromptSampler(num_prompts, per_step, seed, shuffle)
    second.load_state_dict(state)
    assert [first.next(step) for step in range(8)] == [second.next(step) for step in range(8)]
    assert first.epoch == second.epoch


def test_orders_differ_by_epoch_and_seed_and_touch_no_other_generator() -> None:
    before = random.getstate()
    epochs = PromptSampler(50, 50, seed=0, shuffle=True)
    first, second = epochs.next(1), epochs.next(2)
    assert random.getstate() == before
    assert first != second != PromptSampler(50, 50, seed=1, shuffle=True).next(1) != first
    assert first == PromptSampler(50, 50, seed=0, shuffle=True).next(1)


def test_without_shuffling_the_order_is_the_datasets() -> None:
    sampler = PromptSampler(5, 3, seed=0, shuffle=False)
    assert [sampler.next(step) for step in range(3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


def test_another_dataset_or_seed_cannot_be_resumed() -> None:
    state = PromptSampler(5, 2, seed=0, shuffle=True).state_dict()
    with pytest.raises(UserError, match="num_prompts=5, now 6"):
        PromptSampler(6, 2, seed=0, shuffle=True).load_state_dict(state)
    with pytest.raises(UserError, match="seed=0, now 1"):
        PromptSampler(5, 2, seed=1, shuffle=True).load_state_dict(state)


@pytest.mark.parametrize("place", [{"position": 99999}, {"position": -3}, {"epoch": -1}])
def test_a_place_that_is_none_is_refused(place: dict[str, int]) -> None:
    sampler = PromptSampler(5, 2, seed=0, shuffle=True)
    ((key, value),) = place.items()
    with pytest.raises(UserError, match=rf"sampler\.{key} of the checkpoint is {value}; must be 0 to"):
        sampler.load_state_dict(sampler.state_dict() | place)


def test_fewer_prompts_than_a_step_takes_are_told() -> None:
    assert repetition_warning(2, 2) is None
    assert str(repetition_warning(1, 2)).startswith("there are 1 prompt(s) to train on, fewer than the 2 of a step")
