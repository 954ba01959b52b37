"""The packed stream gives what a model gives on each sequence alone, whatever the cut."""

from __future__ import annotations

import random
from dataclasses import fields

import pytest
import torch
from samples import make_item
from tiny import small_llama
from transformers import PreTrainedModel

from sapo_rl.policy import attention
from sapo_rl.policy.model import Policy
from sapo_rl.policy.packing import Item, PackedBatch, empty_batch, join, pack, spread, stream_tokens

VOCABULARY = 97


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return small_llama(VOCABULARY, **shape).double()


def groups_of(sizes: list[int], seed: int) -> list[list[Item]]:
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    return [
        [make_item(prompt, tokens(rng.randint(1, 9)), rng.uniform(-1, 1), rng.random()) for _ in range(size)]
        for size, prompt in ((size, tokens(rng.randint(1, 12))) for size in sizes)
    ]


def reference_logps(model: PreTrainedModel, item: Item, temperature: float) -> torch.Tensor:
    """Log-probabilities from the model's own eager attention on the sequence alone, in float64."""
    (row,) = item.rows
    ids = torch.tensor([[*row.prompt_ids, *row.token_ids]])
    model.set_attn_implementation("eager")
    logits = model(ids).logits[0] / temperature
    model.set_attn_implementation(attention.NAME)
    chosen = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return chosen[len(row.prompt_ids) - 1 :]


def test_joined_micro_batches_are_the_one_that_a_larger_budget_gives() -> None:
    groups = groups_of([4, 1, 3, 8], seed=1)
    (whole,) = pack(groups, 10_000)
    cut = pack(groups, max(stream_tokens(group) for group in groups))
    joined = join(cut)
    assert len(cut) > 1
    for name in (field.name for field in fields(PackedBatch)):
        expected, found = getattr(whole, name), getattr(joined, name)
        if isinstance(expected, torch.Tensor):
            assert found.dtype == expected.dtype and found.tolist() == expected.tolist(), name
        else:
            assert found == expected, name


@pytest.mark.parametrize("budget", [1, 20, 64, 10_000])
def test_packed_equals_one_by_one(model: PreTrainedModel, budget: int) -> None:
    groups = groups_of([4, 1, 3, 8], seed=budget)
    groups[0] += groups_of([2], seed=budget + 1)[0]  # of another prompt: an environment adds to it what it likes
    batches = pack(groups, budget)
    policy = Policy(model, torch.float64)
    packed = torch.cat([policy(batch, 0.7)[0] for batch in batches])
    alone = torch.cat([reference_logps(model, item, 0.7) for group in groups for item in group])
    # the head's softmax is float32 by contract
    torch.testing.assert_close(packed.double(), alone, atol=2e-6, rtol=0)


def test_gradient_does_not_depend_on_the_cut(model: PreTrainedModel) -> None:
    groups = groups_of([4, 2, 8], seed=3)
    policy = Policy(model, torch.float64)

    def gradient(budget: int) -> torch.Tensor:
        model.zero_grad()
        for batch in pack(groups, budget):
            logps, _ = policy(batch, 1.0)
            (logps * batch.advantages * batch.token_weights).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradient(10_000)
    for budget in (1, 17, 40):
        torch.testing.assert_close(gradient(budget), whole, atol=1e-5 * whole.abs().max().item(), rtol=0)


def tokens_of(batch: PackedBatch) -> int:
    return len(batch.input_ids)


def test_prompts_are_computed_once_and_last_tokens_never() -> None:
    group = [make_item([1, 2, 3, 4], [5, 6, 7]), make_item([1, 2, 3, 4], [8])]
    (batch,) = pack([group], 100)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.targets.tolist() == [5, 6, 7, 8]
    assert batch.hidden_index.tolist() == [3, 4, 5, 3]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("seed", range(5))
def test_micro_batches_keep_to_the_budget_and_lose_nothing(seed: int) -> None:
    groups = groups_of([8] * 12, seed)
    batches = pack(groups, 120)
    assert all(tokens_of(batch) <= 120 for batch in batches)
    assert sum(batch.num_sequences for batch in batches) == 96
    expected = [token for group in groups for item in group for token in item.rows[0].token_ids]
    assert torch.cat([batch.targets for batch in batches]).tolist() == expected
    sizes = [tokens_of(batch) for batch in batches]
    largest_group = 12 + 8 * 8
    assert max(sizes) - min(sizes) <= largest_group


def test_sample_longer_than_the_budget_stands_alone() -> None:
    long = make_item(list(range(30)), list(range(30)))
    short = make_item([1], [2, 3])
    assert [batch.num_sequences for batch in pack([[long], [short]], 10)] == [1, 1]


def test_nothing_packs_to_nothing_and_the_filler_weighs_nothing(model: PreTrainedModel) -> None:
    assert pack([], 10) == []
    filler = empty_batch()
    logps, entropy = Policy(model, torch.float64)(filler, 1.0)
    assert logps.shape == entropy.shape == (3,)
    assert filler.token_weights.tolist() == [0.0] * 3


def test_work_is_spread_evenly_over_ranks() -> None:
    rng = random.Random(5)
    for counts in ((40,), (40, 0, 0), (40, 0, 0, 0), (0, 40, 10), (12, 9, 14, 11)):
        costs = [[rng.randint(1, 100) for _ in range(count)] for count in counts]
        owners, loads = spread(costs)
        pairs = [pair for own, new in zip(costs, owners, strict=True) for pair in zip(own, new, strict=True)]
        assert loads == [sum(cost for cost, owner in pairs if owner == rank) for rank in range(len(counts))]
        assert sum(loads) == sum(map(sum, costs)) and max(loads) - min(loads) <= 10
    assert spread([[7, 1, 1, 1], []]) == ([[0, 1, 1, 1], []], [7, 3])
    assert spread([[7, 1], [1, 1]]) == ([[0, 1], [1, 1]], [7, 3])
    assert spread([[], []]) == ([[], []], [0, 0])


def test_balanced_work_stays_where_it_is() -> None:
    rng = random.Random(6)
    costs = [[rng.randint(90, 110) for _ in range(64)] for _ in range(8)]
    owners, loads = spread(costs)
    moved = sum(owner != rank for rank, own in enumerate(owners) for owner in own)
    assert moved <= 8 and max(loads) - min(loads) <= 100
