"""The trainer's forward and backward pass on a GPU: packed equals padded, graphs are few, and nothing waits."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from gpu.waits import update_without_waiting
from tiny import small_llama
from torch import Tensor
from torch._dynamo.utils import counters

from sapo_rl.config import Config, ModelConfig, RolloutConfig, TrainerConfig
from sapo_rl.policy import attention, logprobs
from sapo_rl.policy.model import Policy
from sapo_rl.policy.packing import Item, empty_batch, pack
from sapo_rl.policy.trainer import PolicyTrainer
from sapo_rl.types import Group, Prompt, Row, Sample, Stop

pytestmark = pytest.mark.gpu

VOCABULARY = 1000
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield


def make_policy(dtype: torch.dtype) -> Policy:
    model = small_llama(
        VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    return Policy(model.to(CUDA).train(), dtype)


def make_items(seed: int, prompts: int = 6) -> list[list[Item]]:
    """Groups of eight episodes, of which a quarter has masked tokens and a quarter a further row."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    def episode(prompt: list[int], number: int) -> Item:
        ids = tokens(rng.randint(1, 90))
        rows = [Row(prompt, ids, [(0, 1), (len(ids) // 2 + 1, len(ids))] if number % 4 == 1 else None)]
        if number % 4 == 2:
            rows.append(Row(tokens(rng.randint(1, 70)), tokens(rng.randint(1, 40))))
        return Item(rows, rng.choice((-1.0, 1.0)), 0.01)

    return [
        [episode(prompt, number) for number in range(8)]
        for prompt in (tokens(rng.randint(1, 70)) for _ in range(prompts))
    ]


def gradient_of(policy: Policy) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).clone()
    policy.zero_grad()
    return found


def packed_run(policy: Policy, groups: list[list[Item]], budget: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and the gradient of their sum weighted by the advantages."""
    found = []
    for batch in pack(groups, budget):
        batch = batch.to(CUDA)
        logps, _ = policy(batch, 1.0)
        (logps * batch.advantages * batch.token_weights).sum().backward()
        found.append(logps.detach())
    return torch.cat(found), gradient_of(policy)


def padded_run(policy: Policy, groups: list[list[Item]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same from the model's own eager attention on each sequence alone."""
    policy.model.set_attn_implementation("eager")
    found = []
    for item, row in ((one, row) for group in groups for one in group for row in one.rows):
        ids = torch.tensor([[*row.prompt_ids, *row.token_ids]], device=CUDA)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = policy.model(ids).logits[0].float()
        logps = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[len(row.prompt_ids) - 1 :, 0]
        if row.loss_mask is not None:
            logps = torch.cat([logps[start:end] for start, end in row.loss_mask])
        (logps * item.advantage * item.weight).sum().backward()
        found.append(logps.detach())
    policy.model.set_attn_implementation(attention.NAME)
    return torch.cat(found), gradient_of(policy)


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).float().norm() / expected.float().norm()).item()


@pytest.mark.parametrize("budget", [100_000, 300])
def test_packed_equals_padded_in_float32(budget: int) -> None:
    policy, groups = make_policy(torch.float32), make_items(1)
    logps, gradient = packed_run(policy, groups, budget)
    expected_logps, expected_gradient = padded_run(policy, groups, torch.float32)
    torch.testing.assert_close(logps, expected_logps, atol=2e-4, rtol=0)
    assert distance(gradient, expected_gradient) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_packed_equals_padded_in_bfloat16(compiled: bool, checkpointing: bool) -> None:
    """As near to float32 as the padded computation in bfloat16 is, give or take."""
    policy, groups = make_policy(torch.bfloat16), make_items(2)
    exact_logps, exact_gradient = padded_run(policy, groups, torch.float32)
    padded_logps, padded_gradient = padded_run(policy, groups, torch.bfloat16)
    if checkpointing:
        policy.model.gradient_checkpointing_enable()
    if compiled:
        policy.compile_layers()
    logps, gradient = packed_run(policy, groups, 100_000)
    assert (logps - exact_logps).abs().mean() < 3 * (padded_logps - exact_logps).abs().mean() + 1e-3
    assert distance(gradient, exact_gradient) < 3 * distance(padded_gradient, exact_gradient) + 1e-3


def test_flash_attention_with_shared_prompts_equals_masked_attention() -> None:
    """Completions have fewer queries than keys: causal from the bottom right."""
    batch = pack(make_items(3), 100_000)[0].to(CUDA)
    count = len(batch.input_ids)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, count, 64, device=CUDA).bfloat16().requires_grad_() for heads in (4, 2, 2)
    )
    outside = torch.randn(1, count, 4, 64, device=CUDA)
    results = []
    for dtype in (torch.bfloat16, torch.float32):  # flash attention, then masks
        found, _ = attention.packed_attention(
            torch.nn.Identity(), query.to(dtype), key.to(dtype), value.to(dtype), None, packed=batch
        )
        results.append((found, *torch.autograd.grad((found.float() * outside).sum(), (query, key, value))))
    for ours, expected in zip(*results, strict=True):
        assert distance(ours, expected) < 0.02


@pytest.mark.parametrize("vocabulary", [1000, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_kernels_equal_plain_torch(monkeypatch: pytest.MonkeyPatch, vocabulary: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(333, 64, device=CUDA, dtype=dtype).requires_grad_()
    head = (torch.randn(vocabulary, 64, device=CUDA) / 4).requires_grad_()
    targets = torch.randint(vocabulary, (333,), device=CUDA)
    outside = torch.randn(333, device=CUDA)
    monkeypatch.setitem(logprobs.CHUNK, "cuda", 100 * vocabulary)
    results = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(logprobs, "passes", lambda device: (logprobs.statistics, logprobs.gradient))
        logps, entropy = logprobs.token_logps(hidden, head, targets, 0.7)
        results.append((logps, entropy, *torch.autograd.grad((logps * outside).sum(), (hidden, head))))
    for ours, expected in zip(*results, strict=True):
        assert distance(ours, expected) < (1e-4 if dtype == torch.float32 else 1e-2)


def make_trainer(compile_layers: bool = True) -> PolicyTrainer:
    config = Config(
        ModelConfig("none"),
        rollout=RolloutConfig(max_completion_tokens=90),
        trainer=TrainerConfig(learning_rate=1e-4, tokens_per_micro_batch=1500, compile=compile_layers),
    )
    return PolicyTrainer(make_policy(torch.bfloat16), None, config, Accelerator())


def as_groups(items: list[list[Item]]) -> list[Group]:
    return [
        Group(
            Prompt(i, row[0].rows[0].prompt_ids, "", {}),
            [Sample([*x.rows], Stop.STOP, (0, 0), advantage=x.advantage) for x in row],
        )
        for i, row in enumerate(items)
    ]


def test_no_graph_is_compiled_after_the_second_step() -> None:
    trainer = make_trainer()
    graphs = []
    for step in range(6):
        trainer.train_on(as_groups(make_items(step, prompts=12 + step)), contextlib.nullcontext)
        graphs.append(counters["stats"]["unique_graphs"])
    with torch.no_grad(), trainer.parallel.passes():
        trainer.policy(empty_batch().to(CUDA), 1.0)
    assert graphs[0] > 0
    assert counters["stats"]["unique_graphs"] == graphs[1]
    assert not counters["graph_break"]


def test_updates_do_not_wait_for_the_device() -> None:
    trainer = make_trainer()
    groups = as_groups(make_items(4, prompts=12))
    for _ in range(2):
        trainer.train_on(groups, contextlib.nullcontext)
    assert update_without_waiting(trainer, groups) > 1


def test_compiled_and_plain_updates_agree() -> None:
    weights = []
    for compile_layers in (True, False):
        trainer = make_trainer(compile_layers)
        before = torch.cat([weight.flatten().clone() for _, weight in trainer.policy.named_weights()])
        trainer.train_on(as_groups(make_items(5, prompts=8)), contextlib.nullcontext)
        weights.append(torch.cat([weight.flatten() for _, weight in trainer.policy.named_weights()]) - before)
    assert torch.cosine_similarity(weights[0], weights[1], dim=0) > 0.9  # Adam turns tiny gradients into full steps
