"""Updates of the policy: what they must not depend on, and that they learn."""

from __future__ import annotations

import contextlib
import math
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from sapo_rl.config import (
    AdvantageConfig,
    Config,
    CorrectionConfig,
    KLConfig,
    LossConfig,
    ModelConfig,
    RolloutConfig,
    TrainerConfig,
)
from sapo_rl.errors import UserError
from sapo_rl.policy import attention, checkpoint
from sapo_rl.policy.model import Policy
from sapo_rl.policy.trainer import PolicyTrainer
from sapo_rl.types import Group, Prompt, Sample

VOCABULARY = 41


@contextlib.contextmanager
def no_timer(name: str) -> Iterator[None]:
    yield


def make_policy(dtype: torch.dtype = torch.float32) -> Policy:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        attn_implementation=attention.NAME,
    )
    return Policy(LlamaForCausalLM(config), dtype)


def make_groups(seed: int, zero_spread: int = 0) -> list[Group]:
    """Eight groups of four, the last `zero_spread` of them with advantages of zero."""
    rng = random.Random(seed)
    groups = []
    for index in range(8):
        prompt = Prompt(index, [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 6))], "", {})
        samples = [Sample([rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 7))], False, 0) for _ in range(4)]
        for sample in samples:
            sample.advantage = 0.0 if index >= 8 - zero_spread else rng.gauss(0, 1)
        groups.append(Group(prompt, samples))
    return groups


def make_config(**trainer: object) -> Config:
    config = Config(
        model=ModelConfig(path="none", dtype="float32"),
        rollout=RolloutConfig(batch_size=32, group_size=4, max_completion_tokens=7),
        trainer=TrainerConfig(**{"steps": 4, "learning_rate": 1e-2, "tokens_per_micro_batch": 1000, **trainer}),
    )
    config.reproducible = True
    return config


def weights_after(
    config: Config, groups: list[Group], reference: bool = False
) -> tuple[torch.Tensor, dict[str, float]]:
    trainer = PolicyTrainer(make_policy(), make_policy() if reference else None, config, Accelerator(cpu=True))
    metrics = trainer.train_on(groups, no_timer)
    return torch.cat([weight.flatten().clone() for _, weight in trainer.policy.named_weights()]), metrics


MODES = ["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


@pytest.mark.parametrize("mode", MODES)
def test_update_does_not_depend_on_the_micro_batches(mode: str) -> None:
    found = []
    for budget in (1000, 40, 5):
        config = make_config(tokens_per_micro_batch=budget, updates_per_rollout=4)
        config.loss.loss_agg_mode = mode
        found.append(weights_after(config, make_groups(1)))
    for weights, metrics in found[1:]:
        torch.testing.assert_close(weights, found[0][0], atol=2e-5, rtol=0)
        for name, value in metrics.items():
            assert value == pytest.approx(found[0][1][name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("mode", MODES)
def test_skipping_groups_of_zero_spread_leaves_the_update_as_it_is(mode: str) -> None:
    found = []
    for skip in (True, False):
        config = make_config(updates_per_rollout=2)
        config.advantage = AdvantageConfig(skip_zero_spread=skip)
        config.loss.loss_agg_mode = mode
        found.append(weights_after(config, make_groups(2, zero_spread=5))[0])
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_masked_completions_count_as_having_no_tokens(mode: str) -> None:
    """In a mean over tokens as if they were not there, in one over sequences as if their loss were 0."""
    config = make_config(updates_per_rollout=2, mini_batches=1, adam_eps=1e-5)
    config.loss.loss_agg_mode = mode
    cut, alike = make_groups(5), make_groups(5)
    for index, (group, other) in enumerate(zip(cut, alike, strict=True)):
        for number in range(index % 3, 4, 2) if index else range(4):  # all of the first group's
            group.samples[number].truncated = True
            other.samples[number].advantage = 0.0
        if mode == "token-mean":
            other.samples = [sample for sample in other.samples if sample.advantage]
    expected, _ = weights_after(config, [group for group in alike if group.samples])
    config.advantage.mask_truncated = True
    masked, _ = weights_after(config, cut)
    torch.testing.assert_close(masked, expected, atol=1e-6, rtol=0)
    config.advantage.mask_truncated = False
    assert not torch.allclose(weights_after(config, cut)[0], expected, atol=1e-3)


def test_batch_without_spread_moves_nothing_at_first() -> None:
    before = torch.cat([weight.flatten() for _, weight in make_policy().named_weights()])
    after, metrics = weights_after(make_config(), make_groups(3, zero_spread=8))
    assert torch.equal(before, after)
    assert metrics["policy/loss"] == 0.0


def test_groups_of_zero_spread_stay_where_a_reference_pulls() -> None:
    """A KL penalty has a gradient on every sample, so nothing may be left out."""
    config = make_config(updates_per_rollout=4, mini_batches=1)
    config.loss = LossConfig(kl=KLConfig(coef=0.5))
    _, metrics = weights_after(config, make_groups(4, zero_spread=4), reference=True)
    assert metrics["policy/kl_ref"] > 0


def test_first_update_is_on_policy_and_later_ones_are_not() -> None:
    _, single = weights_after(make_config(updates_per_rollout=1), make_groups(5))
    assert single["policy/ratio_min"] == single["policy/ratio_max"] == 1.0
    _, several = weights_after(make_config(updates_per_rollout=4), make_groups(5))
    assert several["policy/ratio_min"] < 0.999 and several["policy/ratio_max"] > 1.001


def test_sapo_and_grpo_agree_on_policy_and_part_off_policy() -> None:
    def run(name: str, updates: int) -> torch.Tensor:
        config = make_config(updates_per_rollout=updates, mini_batches=1)
        config.loss = LossConfig(name=name, tau_pos=8.0, tau_neg=9.0)
        return weights_after(config, make_groups(6))[0]

    torch.testing.assert_close(run("sapo", 1), run("grpo", 1), atol=2e-5, rtol=0)
    assert (run("sapo", 3) - run("grpo", 3)).abs().max() > 1e-4


def with_rollout_logps(shift: float, seed: int = 9) -> list[Group]:
    """Groups whose vLLM log-probabilities are those of the policy before training, plus `shift`."""
    trainer = PolicyTrainer(make_policy(), None, make_config(), Accelerator(cpu=True))
    groups = make_groups(seed)
    for group in groups:
        for sample in group.samples:
            logps = trainer.score([*group.prompt.token_ids, *sample.token_ids])[-len(sample.token_ids) :]
            sample.rollout_logps = [logp + shift for logp in logps]
    return groups


def test_ratio_against_vllms_log_probabilities() -> None:
    config = make_config(updates_per_rollout=1)
    config.loss = LossConfig(old_logps="rollout")
    _, metrics = weights_after(config, with_rollout_logps(shift=0.1))
    assert metrics["policy/ratio_mean"] == pytest.approx(math.exp(-0.1), abs=1e-5)
    assert metrics["mismatch/kl_k1"] == pytest.approx(0.0, abs=1e-6)


def test_without_mismatch_all_three_ways_are_one() -> None:
    found = []
    for loss in (
        LossConfig(),
        LossConfig(old_logps="rollout"),
        LossConfig(old_logps="decoupled", correction=CorrectionConfig(mode="token_truncate")),
    ):
        config = make_config(updates_per_rollout=4, mini_batches=2, tokens_per_micro_batch=20)
        config.loss = loss
        found.append(weights_after(config, with_rollout_logps(shift=0.0))[0])
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(found[2], found[0], atol=2e-5, rtol=0)


def test_truncated_importance_sampling_caps_the_factor() -> None:
    config = make_config(updates_per_rollout=1)
    correction = CorrectionConfig(mode="token_truncate", high=2.0)
    config.loss = LossConfig(old_logps="decoupled", correction=correction)
    for shift, factor in ((-0.5, math.exp(0.5)), (-3.0, 2.0)):
        _, metrics = weights_after(config, with_rollout_logps(shift))
        assert metrics["mismatch/correction_mean"] == pytest.approx(factor, rel=1e-4)


def test_updates_raise_the_likelihood_of_what_was_rewarded() -> None:
    config = make_config(updates_per_rollout=4, mini_batches=1)
    groups = make_groups(7)
    trainer = PolicyTrainer(make_policy(), None, config, Accelerator(cpu=True))

    def likelihood(positive: bool) -> float:
        samples = [(g.prompt, s) for g in groups for s in g.samples if (s.advantage > 0) == positive]
        values = [trainer.score([*p.token_ids, *s.token_ids])[-len(s.token_ids) :] for p, s in samples]
        return sum(sum(value) / len(value) for value in values) / len(values)

    before = likelihood(True), likelihood(False)
    trainer.train_on(groups, no_timer)
    assert likelihood(True) > before[0] + 0.01
    assert likelihood(False) < before[1] - 0.01


@pytest.mark.parametrize(("interrupted", "dtype"), [(1, torch.float32), (3, torch.float32), (1, torch.bfloat16)])
def test_checkpoint_continues_to_the_last_bit(tmp_path: Path, interrupted: int, dtype: torch.dtype) -> None:
    config = make_config(steps=4, schedule="cosine", warmup_updates=2)

    def fresh() -> PolicyTrainer:
        return PolicyTrainer(make_policy(dtype), None, config, Accelerator(cpu=True))

    whole = fresh()
    expected = [whole.train_on(make_groups(step), no_timer) for step in range(4)][interrupted:]

    first = fresh()
    for step in range(interrupted):
        first.train_on(make_groups(step), no_timer)
        checkpoint.save(tmp_path, step, first, {"note": step}, keep_last=2)
    draw = torch.rand(3)
    second = fresh()
    torch.manual_seed(99)
    step, state = checkpoint.load(checkpoint.latest(tmp_path), second)
    assert (step, state) == (interrupted - 1, {"note": interrupted - 1})
    assert torch.equal(torch.rand(3), draw)
    assert [second.train_on(make_groups(step), no_timer) for step in range(interrupted, 4)] == expected
    assert len(list(tmp_path.glob("step_*"))) == min(2, interrupted)


def test_checkpoints_are_ordered_by_step_and_what_lies_beside_them_is_left_alone(tmp_path: Path) -> None:
    for name in ("step_999999", "step_1000000", "step_old", "step_1000000.bak", "step_2x"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path).name == "step_1000000"
    trainer = PolicyTrainer(make_policy(), None, make_config(), Accelerator(cpu=True))
    checkpoint.save(tmp_path, 1000001, trainer, {}, keep_last=2)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step_1000000", "step_1000001", "step_old", "step_1000000.bak", "step_2x"}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def second_rank(path: Path) -> None:
    """One that has left its random state alone."""
    shutil.copy(path.with_name("random_0.pt"), path.with_name("random_1.pt"))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.json", Path.unlink),
        ("state.json", truncate),
        ("state.json", lambda path: path.write_text("{}")),
        ("state.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
        ("trainer_00000.safetensors", Path.unlink),
        ("trainer_00000.safetensors", truncate),
        ("trainer_00000.safetensors", lambda path: path.write_bytes(b"")),
        ("random_0.pt", lambda path: path.write_text("nothing")),
        ("random_0.pt", truncate),
        ("random_0.pt", lambda path: path.write_bytes(b"")),
        ("trainer_00001.safetensors", second_rank),
    ],
)
def test_a_damaged_checkpoint_is_told_by_its_file_and_what_is_left(tmp_path: Path, name: str, damage: Any) -> None:
    trainer = PolicyTrainer(make_policy(), None, make_config(), Accelerator(cpu=True))
    for step in (1, 2):
        checkpoint.save(tmp_path, step, trainer, {}, keep_last=2)
    shapes = {name: weight.shape for name, weight in trainer.policy.trainable_weights()}
    second = tmp_path / "step_000002"
    (second / "trainer_00000.safetensors.bak").write_text("somebody's own")
    checkpoint.check(second, shapes)
    damage(second / name)
    file = re.escape(str(second / name))
    with pytest.raises(
        UserError, match=rf"^resume: '{file}' cannot be read: .*move '.*' away to resume from step_000001"
    ):
        checkpoint.load(second, trainer)
    shutil.rmtree(tmp_path / "step_000001")
    with pytest.raises(UserError, match="it is the only one: start the run anew"):
        checkpoint.load(second, trainer)


def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path) -> None:
    trainer = PolicyTrainer(make_policy(), None, make_config(), Accelerator(cpu=True))
    checkpoint.save(tmp_path, 1, trainer, {}, keep_last=2)
    shapes: dict[str, Any] = {name: weight.shape for name, weight in trainer.policy.trainable_weights()}
    name, *others = shapes
    for changed, words in (
        (shapes | {name: [3, 5]}, rf"another model or other adapters: weight '{name}' is \[.*\] in it, now \[3, 5\]"),
        (shapes | {"more": [7]}, r"weight 'more' is not there in it, now \[7\]"),
        ({key: shapes[key] for key in others}, rf"weight '{name}' is \[.*\] in it, now not trained"),
    ):
        with pytest.raises(UserError, match=words):
            checkpoint.check(tmp_path / "step_000001", changed)


def test_an_update_in_bfloat16_is_to_the_last_bit_that_of_autocast_over_the_float32_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each micro-batch's gradients are rounded as autocast rounds them, then added up in float32."""
    config = make_config(tokens_per_micro_batch=40, updates_per_rollout=2)
    trainers = [PolicyTrainer(make_policy(torch.bfloat16), None, config, Accelerator(cpu=True)) for _ in range(2)]
    start = weights_of(trainers[0])
    monkeypatch.setattr(trainers[1].parallel, "passes", contextlib.nullcontext)
    monkeypatch.setattr(trainers[1].parallel, "micro_batch", lambda last: contextlib.nullcontext())
    for step in range(2):
        found, expected = (trainer.train_on(make_groups(step), no_timer) for trainer in trainers)
        assert found == expected
        assert trainers[0].score([1, 2, 3, 4]) == trainers[1].score([1, 2, 3, 4])
    for name, weight in trainers[1].policy.named_weights():
        assert weight.dtype == torch.float32
        assert torch.equal(weights_of(trainers[0])[name], weight), name
        assert not torch.equal(weight, start[name]), name


def test_updates_that_bfloat16_would_lose_add_up_in_the_float32_weights() -> None:
    rate, steps = 1e-6, 3
    config = make_config(learning_rate=rate, updates_per_rollout=1)
    trainer = PolicyTrainer(make_policy(torch.bfloat16), None, config, Accelerator(cpu=True))
    name = "model.layers.0.mlp.up_proj.weight"
    start, groups = weights_of(trainer)[name], make_groups(1)
    for _ in range(steps):
        trainer.train_on(groups, no_timer)
    moved = (weights_of(trainer)[name] - start).abs()
    assert moved.max() == pytest.approx(steps * rate, rel=0.05)  # Adam's steps on the same batch all have one size
    half = start.bfloat16()
    assert (half + rate).eq(half).float().mean() > 0.98


def weights_of(trainer: PolicyTrainer) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in trainer.policy.named_weights()}
