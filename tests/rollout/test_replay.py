"""Groups of earlier steps in place of those that teach nothing: which, how old, and going on with them."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save, save_file
from samples import one_row

from sapo_rl.advantages import with_advantages
from sapo_rl.config import RewardFunctionConfig
from sapo_rl.config.loss import AdvantageConfig
from sapo_rl.rollout.replay import Kept, ReplayBuffer, pack, unpack
from sapo_rl.rollout.share import Share
from sapo_rl.types import Batch, Group, Prompt, Replayed, RewardStats, Row, Sample, Stop, Turn, Usage

PROMPTS = {index: Prompt(index, [1, index], f"Question {index}?", {"answer": index}) for index in range(100)}


def group(index: int, *rewards: float) -> Group:
    samples = [
        replace(one_row([7, index], [1, index], rollout_logps=[-0.5, -1.5], text="said"), rewards={"a": reward})
        for reward in rewards
    ]
    return Group(PROMPTS[index], samples)


def batch(groups: Sequence[Group]) -> Batch:
    return Batch([*groups], RewardStats({}, {}, {}), {}, Usage([], 0.0))


def teaches(one: Group) -> bool:
    return len({sample.rewards["a"] for sample in one.samples}) > 1


def buffer(size: int = 8, max_age: int = 3, seed: str = "0/0") -> ReplayBuffer:
    return ReplayBuffer(size, max_age, seed, teaches, ["a"])


def step_batch(step: int, seed: int = 0) -> Batch:
    """Four groups, each of which teaches something or not."""
    rng = random.Random(f"{seed}/{step}")
    return batch([group(4 * step + place, 1.0, rng.choice([0.0, 1.0])) for place in range(4)])


def test_earlier_groups_take_the_places_of_those_that_teach_nothing_and_no_others() -> None:
    replay = buffer()
    first = batch([group(0, 1, 0), group(1, 1, 1), group(2, 0, 1)])
    assert replay.fill(1, first).replayed == {}  # nothing is there yet
    second = batch([group(3, 0, 0), group(4, 1, 0), group(5, 1, 1)])
    filled = replay.fill(2, second)
    assert filled.groups == second.groups
    assert {one.group.prompt.index for one in filled.replayed.values()} == {0, 2}
    assert set(filled.replayed) == {0, 2} and all(one.age == 1 for one in filled.replayed.values())
    assert [one.prompt.index for one in filled.trained][1] == 4
    third = replay.fill(3, batch([group(6, 0, 0)] * 4))
    assert sorted((one.group.prompt.index, one.age) for one in third.replayed.values()) == [(0, 2), (2, 2), (4, 1)]
    assert third.trained[3].prompt.index == 6  # there are no more
    sample = third.trained[0].samples[0]
    assert sample.rows[0].rollout_logps == [-0.5, -1.5] and sample.rewards.keys() == {"a"} and not sample.text


def test_groups_are_forgotten_by_age_and_the_oldest_first_by_number() -> None:
    replay = buffer(size=3, max_age=2)
    replay.fill(1, batch([group(0, 1, 0), group(1, 1, 0)]))
    replay.fill(2, batch([group(2, 1, 0), group(3, 1, 0)]))

    def there(step: int) -> set[int]:
        empty = replay.fill(step, batch([group(9, 0, 0)] * 5))
        return {one.group.prompt.index for one in empty.replayed.values()}

    assert there(3) == {1, 2, 3}
    assert there(4) == {2, 3}
    assert there(5) == set()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 5))
def test_a_resumed_buffer_goes_on_exactly(max_age: int, stop: int, seed: int) -> None:
    whole = buffer(6, max_age)
    for step in range(1, stop + 1):
        whole.fill(step, step_batch(step, seed))
    resumed = buffer(6, max_age)
    with tempfile.TemporaryDirectory() as folder:
        save_file(whole.state(), Path(folder) / "loop_00000.safetensors")
        resumed.load([*Path(folder).iterdir()], Share(0, 1), PROMPTS)
    for step in range(stop + 1, stop + 8):
        assert resumed.fill(step, step_batch(step, seed)) == whole.fill(step, step_batch(step, seed))


def test_which_groups_are_chosen_depends_on_rank_seed_and_step() -> None:
    def chosen(seed: str, step: int) -> list[int]:
        replay = buffer(20, 9, seed)
        replay.fill(1, batch([group(index, 1, 0) for index in range(20)]))
        return [one.prompt.index for one in replay.fill(step, batch([group(30, 1, 1)] * 3)).trained]

    first = chosen("0/0", 2)
    assert first == chosen("0/0", 2) and len(set(first)) == 3
    assert first != chosen("0/1", 2) and first != chosen("1/0", 2) and first != chosen("0/0", 3)


spans = st.lists(st.integers(0, 9), max_size=6, unique=True).map(sorted)
rows = st.builds(
    lambda prompt, tokens, ends, logps: Row(
        prompt, tokens, None if ends is None else list(zip(ends[::2], ends[1::2], strict=False)), logps
    ),
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3),
    st.lists(st.integers(0, 2**31 - 1), max_size=5),
    st.none() | spans,
    st.lists(st.floats(-50, 0, width=32), max_size=5),
)
kept = st.builds(
    lambda step, index, samples: Kept(step, Group(PROMPTS[index], samples)),
    st.integers(1, 10**6),
    st.integers(0, 99),
    st.lists(
        st.builds(
            lambda own, stop, versions, a, b: Sample(own, stop, versions, rewards={"a": a, "b": b}),
            st.lists(rows, min_size=1, max_size=3),
            st.sampled_from(list(Stop)),
            st.tuples(st.integers(0, 9), st.integers(0, 9)),
            st.none() | st.floats(-1e100, 1e100),
            st.none() | st.floats(-1e100, 1e100),
        ),
        max_size=3,
    ),
)


@settings(deadline=None)
@given(st.lists(kept, max_size=4))
def test_groups_come_back_from_a_file_as_they_were(groups: list[Kept]) -> None:
    arrays = load(save(pack(groups, ["a", "b"])))
    assert unpack(arrays, PROMPTS, ["a", "b"]) == groups
    assert unpack(arrays, PROMPTS, ["a"]) == unpack(arrays, PROMPTS, ["a", "c"]) == []  # other rewards
    some = {index: prompt for index, prompt in PROMPTS.items() if index % 2}
    assert unpack(arrays, some, ["a", "b"]) == [one for one in groups if one.group.prompt.index % 2]


def test_what_an_update_does_not_need_is_not_kept() -> None:
    whole = group(0, 1, 0)
    episode = replace(whole.samples[0], messages=[{"role": "user"}], opening=[], info={"a": 1}, turns=[Turn(0, 1)])
    replay = buffer()
    replay.fill(1, batch([Group(whole.prompt, [episode, whole.samples[1]])]))
    (one,) = replay.fill(2, batch([group(1, 0, 0)])).replayed.values()
    assert one.group.samples[0] == Sample(episode.rows, episode.stop, episode.versions, rewards={"a": 1})


def test_another_number_of_ranks_deals_the_groups_out_anew(tmp_path: Path) -> None:
    files = []
    for rank in range(2):
        replay = buffer(4, 9)
        for step in (1, 2):
            replay.fill(step, batch([group(10 * rank + 2 * step + place, 1, 0) for place in range(2)]))
        files.append(tmp_path / f"loop_{rank:05d}.safetensors")
        save_file(replay.state(), files[-1])

    def there(rank: int, ranks: int, size: int = 4) -> list[tuple[int, int]]:
        replay = buffer(size, 9)
        replay.load(files, Share(rank, ranks), PROMPTS)
        filled = replay.fill(3, batch([group(50, 0, 0)] * 8))
        return sorted((one.group.prompt.index, one.age) for one in filled.replayed.values())

    own = [(2, 2), (3, 2), (4, 1), (5, 1)]
    assert there(0, 2) == own and there(1, 2) == [(index + 10, age) for index, age in own]
    alone = there(0, 1, size=8)
    assert sorted(alone) == sorted(there(0, 2) + there(1, 2))
    assert [age for _, age in there(0, 1)] == [1, 1, 1, 1]  # the newest stay
    parts = [one for rank in range(4) for one in there(rank, 4)]
    assert sorted(parts) == alone and all(len(there(rank, 4)) == 2 for rank in range(4))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_replayed_groups_get_advantages_as_the_others_do(scale: str) -> None:
    functions = {"a": RewardFunctionConfig("a")}
    fresh = [group(0, 1, 0), group(1, 0.5, 0.5)]
    filled = replace(batch(fresh), replayed={1: Replayed(group(2, 3, 1), 2)})
    settings = AdvantageConfig(scale=scale)
    judged = with_advantages(filled, functions, settings, lambda found: found)
    alone = with_advantages(batch(fresh), functions, settings, lambda found: found)
    assert judged.groups == alone.groups and judged.replayed[1].age == 2
    assert judged.trained == [alone.groups[0], judged.replayed[1].group]
    deviation = {"group": 2**0.5, "batch": (1 / 6) ** 0.5, "none": 1 - 1e-6}[scale]  # of 1, 0, 0.5 and 0.5
    advantages = [sample.advantage for sample in judged.replayed[1].group.samples]
    assert advantages == pytest.approx([1 / (deviation + 1e-6), -1 / (deviation + 1e-6)])
    assert [sample.reward for sample in judged.replayed[1].group.samples] == [3, 1]
