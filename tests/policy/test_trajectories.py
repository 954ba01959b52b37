"""Episodes with tokens that are not trained on, in one row or several, against padded sequences; all in float64."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from losses.batches import SETTINGS
from tiny import small_llama
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sapo_rl.losses import AGGREGATION_MODES, POLICY_LOSS_FN, BatchPolicyLossFn, LossInputs, build_loss, token_weights
from sapo_rl.policy import attention
from sapo_rl.policy.packing import Item, PackedBatch, pack, stream_tokens
from sapo_rl.types import Row, Span

VOCABULARY, NORMALIZER = 53, 16.0
CORRECTION = {"mode": "sequence_mask", "low": 0.9, "high": 1.1, "stale_negative_kl": 0.2}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    model = small_llama(VOCABULARY)
    for module in [*model.modules()]:
        for name, norm in module.named_children():
            if isinstance(norm, LlamaRMSNorm):  # it computes in float32 whatever it is given
                setattr(module, name, nn.RMSNorm(32, norm.variance_epsilon))
    return model.double()


def tokens(rng: random.Random, least: int, most: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(rng.randint(least, most))]


def spans(rng: random.Random, length: int) -> list[Span] | None:
    """Up to three spans that do not overlap; now and then all tokens, or none."""
    if rng.random() < 0.25:
        return rng.choice((None, None, []))
    cuts = sorted(rng.sample(range(length + 1), k=min(length + 1, rng.choice((2, 4, 6))) // 2 * 2))
    return list(zip(cuts[::2], cuts[1::2], strict=True))


def episodes(seed: int, rows: int = 1) -> list[list[Item]]:
    """Three groups of up to four episodes of up to `rows` rows, with vLLM's log-probabilities of the trained tokens."""
    rng = random.Random(seed)

    def row(prompt: list[int]) -> Row:
        ids = tokens(rng, 1, 12)
        found = Row(prompt, ids, spans(rng, len(ids)))
        return replace(found, rollout_logps=[-rng.expovariate(0.5) for _ in range(found.num_trained)])

    def episode(prompt: list[int]) -> Item:
        further = [row(tokens(rng, 1, 9)) for _ in range(rng.randint(0, rows - 1))]
        return Item([row(prompt), *further], rng.choice((-1.5, -0.5, 0.75, 2.0)), 0.0)

    return [[episode(prompt) for _ in range(rng.randint(1, 4))] for prompt in (tokens(rng, 1, 8) for _ in range(3))]


def flat(groups: list[list[Item]]) -> list[Item]:
    return [item for group in groups for item in group]


def places(row: Row) -> Iterator[int]:
    """The trained places of a row, one by one."""
    for start, end in [(0, len(row.token_ids))] if row.loss_mask is None else row.loss_mask:
        yield from range(start, end)


def weighted(groups: list[list[Item]], mode: str) -> list[list[Item]]:
    """The same with the weights of the whole batch."""
    lengths = torch.tensor([sum(row.num_trained for row in item.rows) for item in flat(groups)])
    counts = {"num_sequences": len(lengths), "num_tokens": int(lengths.sum()), "normalizer": NORMALIZER}
    weights = iter(token_weights(lengths, mode, **counts).tolist())
    return [[replace(item, weight=next(weights)) for item in group] for group in groups]


def old_logps(of: Tensor) -> Tensor:
    """Log-probabilities that differ from now's by what the trained token's number says, whatever the layout."""
    return of.detach() + 0.3 * torch.sin(1.7 * torch.arange(len(of), dtype=torch.float64))


def hidden_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    embedded = model.get_input_embeddings()(batch.input_ids[None])
    places = batch.position_ids[None]
    return model.base_model(inputs_embeds=embedded, position_ids=places, use_cache=False, packed=batch)[0][0]


def packed_logps(model: PreTrainedModel, batch: PackedBatch, garbage: bool = False) -> Tensor:
    """What `Policy` returns, with a softmax in float64; `garbage`: where no trained token is predicted, NaN."""
    hidden = hidden_states(model, batch)
    if garbage:
        used = torch.zeros(len(hidden), 1, dtype=torch.bool).index_fill(0, batch.hidden_index, True)
        hidden = torch.where(used, hidden, torch.nan)
    logits = model.get_output_embeddings()(hidden[batch.hidden_index])
    return logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]


def loss_inputs(batch: PackedBatch, items: list[Item], logps: Tensor, old: Tensor) -> LossInputs:
    """As the trainer makes them, with advantages and weights in float64."""
    advantages = torch.tensor([item.advantage for item in items], dtype=torch.float64)[batch.sequence_ids]
    weights = torch.tensor([item.weight for item in items], dtype=torch.float64)[batch.sequence_ids]
    assert torch.equal(batch.advantages, advantages.float()) and torch.equal(batch.token_weights, weights.float())
    return LossInputs(
        logps=logps,
        old_logps=old,
        advantages=advantages,
        sequence_ids=batch.sequence_ids,
        num_sequences=batch.num_sequences,
        token_weights=weights,
        rollout_logps=None if batch.rollout_logps is None else batch.rollout_logps.double(),
    )


def packed_loss(
    model: PreTrainedModel, groups: list[list[Item]], mode: str, loss: dict, budget: int = 10_000, garbage: bool = False
) -> tuple[Tensor, Tensor]:
    """Loss of the groups, and its gradient at all weights of the model."""
    groups = weighted(groups, mode)
    items, evaluate = flat(groups), build_loss(**loss)
    batches = pack(groups, budget)
    sizes = [len(batch.targets) for batch in batches]
    now = torch.cat([packed_logps(model, batch) for batch in batches]).detach()
    old = old_logps(now).split(sizes)
    limit = None
    if isinstance(evaluate.policy, BatchPolicyLossFn):
        limit = evaluate.policy.batch_limit(now - torch.cat(old), torch.cat([one.advantages for one in batches]))
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch, part in zip(batches, old, strict=True):
        own, items = items[: batch.num_sequences], items[batch.num_sequences :]
        inputs = replace(loss_inputs(batch, own, packed_logps(model, batch, garbage), part), limit=limit)
        value = evaluate(inputs).loss
        value.backward()
        total += value.detach()
    return total, gradient(model)


def gradient(model: PreTrainedModel) -> Tensor:
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]).clone()


def padded_logps(model: PreTrainedModel, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all tokens but the first of right-padded rows, (B, T), and 1 at the trained ones."""
    width = max(len(row.prompt_ids) + len(row.token_ids) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for number, row in enumerate(rows):
        stream = [*row.prompt_ids, *row.token_ids]
        ids[number, : len(stream)] = torch.tensor(stream)
        for place in places(row):
            mask[number, len(row.prompt_ids) + place] = 1
    model.set_attn_implementation("sdpa")
    logits = model(ids).logits  # causal, and padded on the right: what is real sees no padding
    model.set_attn_implementation(attention.NAME)
    return logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0], mask[:, 1:]


def close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-11) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@pytest.mark.parametrize("name", SETTINGS)
def test_masked_spans_give_loss_and_gradient_of_padded_sequences_that_mask_them(
    model: PreTrainedModel, name: str, mode: str
) -> None:
    groups = episodes(seed=len(name))
    settings = {"name": name} | SETTINGS[name]
    found = packed_loss(model, groups, mode, settings, budget=30)
    items = flat(groups)
    logps, mask = padded_logps(model, [item.rows[0] for item in items])
    live = mask.bool()
    old = torch.full_like(logps, torch.nan).masked_scatter(live, old_logps(logps[live]))  # garbage under the mask
    own = {key: value for key, value in settings.items() if key != "name"}
    policy = POLICY_LOSS_FN.get(settings["name"])(loss_agg_mode=mode, loss_agg_norm=NORMALIZER, **own)
    advantages = torch.tensor([item.advantage for item in items], dtype=torch.float64)
    loss, _ = policy(logps, old, mask, advantages)
    if mode == "seq-mean-token-sum-norm":
        loss = loss / len(items)  # the padded call does not divide by the number of sequences
    model.zero_grad()
    loss.backward()
    close(found, (loss.detach(), gradient(model)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@pytest.mark.parametrize("name", ["sapo", "gspo", "vespo"])
def test_an_episode_cut_into_rows_changes_nothing_but_what_attention_sees(
    model: PreTrainedModel, name: str, mode: str, seed: int
) -> None:
    """Each further row has all that came before for its prompt: what attention sees is the same, and so is all else."""
    rng = random.Random(seed)
    groups = episodes(seed)

    def cut(item: Item) -> Item:
        rows, (row,) = [], item.rows
        trained = list(places(row))
        bounds = [0, *sorted(rng.sample(range(1, len(row.token_ids)), k=min(2, len(row.token_ids) - 1)))]
        for start, end in zip(bounds, [*bounds[1:], len(row.token_ids)], strict=True):
            mask = [(place - start, place - start + 1) for place in trained if start <= place < end]
            logps = [row.rollout_logps[trained.index(start + place)] for place, _ in mask]
            rows.append(Row([*row.prompt_ids, *row.token_ids[:start]], row.token_ids[start:end], mask, logps))
        return replace(item, rows=rows)

    in_rows = [[cut(item) for item in group] for group in groups]
    assert max(len(item.rows) for item in flat(in_rows)) == 3
    loss = {"name": name} | SETTINGS[name] | {"correction": CORRECTION}
    expected = packed_loss(model, groups, mode, loss)
    for budget in (10_000, 40):
        close(packed_loss(model, in_rows, mode, loss, budget), expected)


@pytest.mark.parametrize("seed", range(3))
def test_further_rows_are_sequences_of_their_own_to_attention(model: PreTrainedModel, seed: int) -> None:
    groups = episodes(seed, rows=3)
    (batch,) = pack(groups, 10_000)
    rows = [row for item in flat(groups) for row in item.rows]
    logps, mask = padded_logps(model, rows)
    torch.testing.assert_close(packed_logps(model, batch), logps[mask.bool()], rtol=1e-11, atol=1e-11)
    assert batch.targets.tolist() == [row.token_ids[place] for row in rows for place in places(row)]
    assert batch.rollout_logps is not None
    expected = torch.tensor([logp for row in rows for logp in row.rollout_logps or []])
    assert torch.equal(batch.rollout_logps, expected)
    counts = [sum(row.num_trained for row in item.rows) for item in flat(groups)]
    assert torch.equal(batch.sequence_ids, torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)))


@pytest.mark.parametrize("seed", range(3))
def test_garbage_where_nothing_is_trained_reaches_neither_loss_nor_gradient(model: PreTrainedModel, seed: int) -> None:
    groups, loss = episodes(seed, rows=3), {"name": "sapo", "gradient": "paper", "correction": CORRECTION}
    expected = packed_loss(model, groups, "seq-mean-token-mean", loss)
    close(packed_loss(model, groups, "seq-mean-token-mean", loss, garbage=True), expected)

    def spoiled(row: Row) -> Row:
        if row.loss_mask is None:
            return row
        rest = len(row.token_ids) - row.trained_until  # such as what an environment says to a model that is not asked
        return replace(row, token_ids=[*row.token_ids[: row.trained_until], *[10**9] * rest, 10**9])

    masked = [[replace(item, rows=[*map(spoiled, item.rows)]) for item in group] for group in groups]
    close(packed_loss(model, masked, "seq-mean-token-mean", loss), expected)


@pytest.mark.parametrize("seed", range(10))
def test_costs_are_tokens_of_the_stream_and_episodes_stay_whole(seed: int) -> None:
    groups = episodes(seed, rows=3)
    (whole,) = pack(groups, 10_000)
    assert len(whole.input_ids) == sum(stream_tokens(group) for group in groups)
    for budget in (1, 30, 60):
        batches = pack(groups, budget)
        assert all(len(batch.input_ids) <= budget or batch.num_sequences == 1 for batch in batches)
        assert torch.equal(torch.cat([batch.targets for batch in batches]), whole.targets)
        assert sum(batch.num_sequences for batch in batches) == len(flat(groups))


def test_the_layout_of_a_masked_episode_of_two_rows() -> None:
    first = Row([1, 2], [5, 6, 7, 8, 9, 4], [(0, 2), (4, 5)])  # 7 and 8 are context, 4 has no part
    second = Row([3], [6, 5], [(1, 2)])
    (batch,) = pack([[Item([first, second], 1.0, 0.25), Item([Row([1, 2], [8, 9])], -1.0, 0.5)]], 100)
    assert batch.input_ids.tolist() == [1, 2, 5, 6, 7, 8, 8, 3, 6]  # the prompt once, its followers, the further row
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 2, 0, 1]
    assert batch.targets.tolist() == [5, 6, 9, 5, 8, 9]
    assert batch.hidden_index.tolist() == [1, 2, 5, 8, 1, 6]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 0, 1, 1]
    assert batch.token_weights.tolist() == [0.25] * 4 + [0.5] * 2
    assert batch.cu_seq_q.tolist() == [0, 2, 6, 7, 8, 9]
    assert batch.cu_seq_k.tolist() == [0, 2, 8, 11, 12, 14]


def test_a_row_without_trained_tokens_needs_no_log_probabilities() -> None:
    context, reply = Row([1, 2], [5, 6], []), Row([3], [7, 8], [(1, 2)], [-0.5])
    (batch,) = pack([[Item([context, reply], 1.0, 1.0)]], 100)
    assert batch.rollout_logps is not None and batch.rollout_logps.tolist() == [-0.5]
    assert (batch.targets.tolist(), batch.hidden_index.tolist()) == ([8], [3])
    assert batch.input_ids.tolist() == [1, 2, 3, 7]
