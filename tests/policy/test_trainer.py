"""Updates of the policy: what they must not depend on, and that they learn."""

from __future__ import annotations

import contextlib
import errno
import importlib
import math
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.numpy import load_file
from samples import as_group
from tiny import small_llama

from sapo_rl.config import Config, ModelConfig, RolloutConfig, TrainerConfig
from sapo_rl.config.loss import AdvantageConfig, CorrectionConfig, KLConfig, LossConfig
from sapo_rl.errors import UserError
from sapo_rl.losses import LossInputs
from sapo_rl.policy import checkpoint
from sapo_rl.policy.model import Policy
from sapo_rl.policy.trainer import PolicyTrainer, objective
from sapo_rl.run_folder import latest_checkpoint
from sapo_rl.types import Group, Prompt, Row, Sample, Stop

VOCABULARY = 41


def make_policy(dtype: torch.dtype = torch.float32) -> Policy:
    return Policy(small_llama(VOCABULARY), dtype)


def make_groups(seed: int, zero_spread: int = 0, least: int = 1) -> list[Group]:
    """Eight groups of four of `least` to 7 tokens, the last `zero_spread` of them with advantages of zero."""
    rng = random.Random(seed)
    groups = []
    for index in range(8):
        prompt = Prompt(index, [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 6))], "", {})
        replies = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(least, 7))] for _ in range(4)]
        flat = index >= 8 - zero_spread
        groups.append(as_group(prompt, replies, [0.0 if flat else rng.gauss(0, 1) for _ in replies]))
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
    metrics = trainer.train_on(groups, contextlib.nullcontext)
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


@pytest.mark.parametrize("masked", ["truncated", "nothing trained"])
@pytest.mark.parametrize("mode", MODES)
def test_masked_completions_count_as_having_no_tokens(mode: str, masked: str) -> None:
    """In a mean over tokens as if they were not there, in one over sequences as if their loss were 0."""
    config = make_config(updates_per_rollout=2, mini_batches=1, adam_eps=1e-5)
    config.loss.loss_agg_mode = mode
    cut, alike = make_groups(5), make_groups(5)
    for index, (group, other) in enumerate(zip(cut, alike, strict=True)):
        for number in range(index % 3, 4, 2) if index else range(4):  # all of the first group's
            sample = group.samples[number]
            nothing = replace(sample, rows=[replace(sample.rows[0], loss_mask=[])])
            group.samples[number] = replace(sample, stop=Stop.LENGTH) if masked == "truncated" else nothing
            other.samples[number] = replace(other.samples[number], advantage=0.0)
        if mode == "token-mean":
            other.samples[:] = [sample for sample in other.samples if sample.advantage]
    expected, _ = weights_after(config, [group for group in alike if group.samples])
    config.advantage.mask_truncated = masked == "truncated"
    torch.testing.assert_close(weights_after(config, cut)[0], expected, atol=1e-6, rtol=0)
    if config.advantage.mask_truncated:
        config.advantage.mask_truncated = False
        assert not torch.allclose(weights_after(config, cut)[0], expected, atol=1e-3)


def ends_alone(sample: Sample) -> Sample:
    """The sample with all but its first and its last token masked."""
    (row,), last = sample.rows, len(sample.token_ids) - 1
    logps = row.rollout_logps and [row.rollout_logps[0], row.rollout_logps[last]]
    return replace(sample, rows=[replace(row, loss_mask=[(0, 1), (last, last + 1)], rollout_logps=logps)])


def in_three_rows(sample: Sample) -> Sample:
    """The same with the first token, the masked ones and the last one in a row each, after all that came before."""
    ids, last, rows = sample.token_ids, len(sample.token_ids) - 1, []
    logps = sample.rows[0].rollout_logps
    for start, end, mask in ((0, 1, None), (1, last, []), (last, last + 1, None)):
        own = logps and (logps[start:end] if mask is None else [])
        rows.append(Row([*sample.rows[0].prompt_ids, *ids[:start]], ids[start:end], mask, own))
    return replace(sample, rows=rows)


@pytest.mark.parametrize("mode", MODES)
def test_an_episode_of_several_rows_is_one_sequence_of_its_trained_tokens(mode: str) -> None:
    config = make_config(updates_per_rollout=4, mini_batches=2, tokens_per_micro_batch=50, adam_eps=1e-5)
    config.loss.loss_agg_mode = mode
    groups = make_groups(11, least=3)
    masked, cut = (
        [replace(group, samples=[*map(change, group.samples)]) for group in groups]
        for change in (ends_alone, in_three_rows)
    )
    (expected, told), (found, metrics) = weights_after(config, masked), weights_after(config, cut)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    for name, value in told.items():
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert not torch.allclose(weights_after(config, groups)[0], expected, atol=1e-3)


@pytest.mark.parametrize("name", ["sapo", "grpo", "gspo"])
def test_the_values_of_tokens_are_those_that_the_metrics_are_of(name: str) -> None:
    """Each sample that is trained on has them once, whatever micro-batch and mini-batch it came in."""
    config = make_config(updates_per_rollout=4, tokens_per_micro_batch=30)
    config.loss.name, config.logging.tokens, config.advantage.mask_truncated = name, True, True
    if name == "gspo":
        config.loss.clip_low = config.loss.clip_high = 0.02
    groups = make_groups(11, zero_spread=3, least=3)
    rng = random.Random(5)
    for number, group in enumerate(groups):
        logged = [replace(one, rows=[with_logps(row, rng) for row in one.rows]) for one in group.samples]
        group.samples[:] = [[ends_alone, in_three_rows, lambda one: one][number % 3](one) for one in logged]
    groups[0].samples[1] = replace(groups[0].samples[1], stop=Stop.LENGTH)
    trainer = PolicyTrainer(make_policy(), None, config, Accelerator(cpu=True))
    metrics = trainer.train_on(groups, contextlib.nullcontext)
    places = [tuple(one.place) for one in trainer.tokens]
    assert sorted(places) == [(0, g, s) for g in range(5) for s in range(4) if (g, s) != (0, 1)]
    for one in trainer.tokens:
        sample = groups[one.place.group].samples[one.place.sample]
        assert [row.token_ids for row in one.rows] == [row.token_ids for row in sample.rows if row.num_trained]
        assert one.advantage == sample.advantage
        assert {len(column) for column in one.columns.values()} == {sample.num_trained}
        told = [logp for row in one.rows for logp in row.rollout_logps or ()]
        np.testing.assert_allclose(one.columns["rollout_logps"], told, rtol=1e-6)
    whole = {key: np.concatenate([one.columns[key] for one in trainer.tokens]) for key in trainer.tokens[0].columns}
    lengths = [len(one.columns["ratio"]) for one in trainer.tokens]
    advantages = np.repeat([one.advantage for one in trainer.tokens], lengths)
    ratio, weight, expected = whole["ratio"].astype(float), whole["gradient_weight"], metrics
    assert ratio.std() > 1e-3
    for key, value in {
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "weight_mean_pos": weight[advantages > 0].mean(),
        "weight_mean_neg": weight[advantages < 0].mean(),
        "weighted_ratio_max": (weight * ratio).max(),
        "entropy": whole["entropy"].mean(),
        "kl_old_k1": (whole["old_logps"] - whole["logps"]).mean(),
    }.items():
        assert value == pytest.approx(expected[f"policy/{key}"], rel=1e-5, abs=1e-7), key
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    loss = objective(config.loss)(
        LossInputs(
            logps=torch.tensor(whole["logps"]),
            old_logps=torch.tensor(whole["old_logps"]),
            advantages=torch.tensor(advantages, dtype=torch.float32),
            sequence_ids=ids,
            num_sequences=len(lengths),
            token_weights=torch.tensor([one.weight for one in trainer.tokens])[ids],
        )
    ).loss
    assert loss.item() / 4 == pytest.approx(metrics["policy/loss"], rel=1e-5)  # of four updates, each on its part


def with_logps(row: Row, rng: random.Random) -> Row:
    return replace(row, rollout_logps=[-rng.random() for _ in row.token_ids])


def test_the_values_of_tokens_are_those_of_the_last_update_on_them_and_only_kept_where_asked() -> None:
    config = make_config(updates_per_rollout=2, mini_batches=1)
    config.logging.tokens = True
    once, twice = make_config(updates_per_rollout=1), PolicyTrainer(make_policy(), None, config, Accelerator(cpu=True))
    metrics = twice.train_on(make_groups(4), contextlib.nullcontext)
    ratio = np.concatenate([one.columns["ratio"] for one in twice.tokens]).astype(float)
    assert (1 + ratio.mean()) / 2 == pytest.approx(metrics["policy/ratio_mean"], rel=1e-6)  # at the first it is 1
    assert abs(ratio.mean() - 1) > 1e-4
    assert len(twice.tokens) == 32
    trainer = PolicyTrainer(make_policy(), None, once, Accelerator(cpu=True))
    trainer.train_on(make_groups(4), contextlib.nullcontext)
    assert trainer.tokens == []


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
        for number, sample in enumerate(group.samples):
            logps = trainer.score([*group.prompt.token_ids, *sample.token_ids])[-len(sample.token_ids) :]
            row = replace(sample.rows[0], rollout_logps=[logp + shift for logp in logps])
            group.samples[number] = replace(sample, rows=[row])
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
    trainer.train_on(groups, contextlib.nullcontext)
    assert likelihood(True) > before[0] + 0.01
    assert likelihood(False) < before[1] - 0.01


@pytest.mark.parametrize(("interrupted", "dtype"), [(1, torch.float32), (3, torch.float32), (1, torch.bfloat16)])
def test_checkpoint_continues_to_the_last_bit(tmp_path: Path, interrupted: int, dtype: torch.dtype) -> None:
    config = make_config(steps=4, schedule="cosine", warmup_updates=2)

    def fresh() -> PolicyTrainer:
        return PolicyTrainer(make_policy(dtype), None, config, Accelerator(cpu=True))

    whole = fresh()
    expected = [whole.train_on(make_groups(step), contextlib.nullcontext) for step in range(4)][interrupted:]

    first = fresh()
    for step in range(interrupted):
        first.train_on(make_groups(step), contextlib.nullcontext)
        checkpoint.save(tmp_path, step + 1, first, {"note": step}, keep_last=2)
    draw = torch.rand(3)
    second = fresh()
    torch.manual_seed(99)
    step, state = checkpoint.load(latest_checkpoint(tmp_path), second)
    assert (step, state) == (interrupted, {"note": interrupted - 1})
    assert torch.equal(torch.rand(3), draw)
    assert [second.train_on(make_groups(step), contextlib.nullcontext) for step in range(interrupted, 4)] == expected
    assert len(list(tmp_path.glob("step_*"))) == min(2, interrupted)


def test_checkpoints_are_ordered_by_step_and_what_lies_beside_them_is_left_alone(tmp_path: Path) -> None:
    for name in ("step_999999", "step_1000000", "step_old", "step_1000000.bak", "step_2x"):
        (tmp_path / name).mkdir()
    assert latest_checkpoint(tmp_path).name == "step_1000000"
    trainer = PolicyTrainer(make_policy(), None, make_config(), Accelerator(cpu=True))
    checkpoint.save(tmp_path, 1000001, trainer, {}, keep_last=2)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step_1000000", "step_1000001", "step_old", "step_1000000.bak", "step_2x"}


def shapes_of(trainer: PolicyTrainer) -> dict[str, Any]:
    return {name: weight.shape for name, weight in trainer.policy.trainable_weights()}


def everything(trainer: PolicyTrainer) -> list[bytes]:
    """Weights, moments, counts, rates and random states, bit by bit."""
    optimizer = trainer.parallel.optimizer
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    tensors += [weight for _, weight in trainer.policy.named_weights()]
    numbers = [trainer.updates, trainer.planned, [group["lr"] for group in optimizer.param_groups]]
    generators = [random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:]]
    return [
        *(tensor.detach().numpy().tobytes() for tensor in tensors),
        repr([*numbers, *generators]).encode(),
        torch.get_rng_state().numpy().tobytes(),
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of the first two steps."""
    folder = tmp_path_factory.mktemp("checkpoints")
    trainer = PolicyTrainer(make_policy(), None, make_config(), Accelerator(cpu=True))
    for step in (1, 2):
        trainer.train_on(make_groups(step), contextlib.nullcontext)
        np.random.standard_normal()  # leaves a number of which the state must know
        own = {"tokens": np.arange(step, step + 9), "none": np.zeros((0, 2), np.float32)}
        checkpoint.save(folder, step, trainer, {"sampler": {"position": 8 * step}}, 2, own)
    return folder


def resumed_from(folder: Path) -> tuple[list[bytes], dict[str, Any]]:
    trainer = PolicyTrainer(make_policy(), None, make_config(), Accelerator(cpu=True))
    checkpoint.check(folder, shapes_of(trainer), trainer.accelerator)
    step, state = checkpoint.load(folder, trainer)
    assert step == 2
    return everything(trainer), state


def damage(file: Path, kind: str, rng: random.Random) -> None:
    """Do something to a file that a disk, a copy or a person might."""
    data = bytearray(file.read_bytes())
    at, length = rng.randrange(len(data)), rng.randint(1, 64)
    match kind:
        case "flip":
            data[at] ^= 1 << rng.randrange(8)
        case "zero":
            data[at : at + length] = bytes(len(data[at : at + length]))
        case "swap":
            other = rng.randrange(len(data))
            data[at], data[other] = data[other], data[at]
        case "cut":
            del data[at:]
        case "append":
            data += rng.randbytes(length)
    file.write_bytes(data)
    if kind == "delete":
        file.unlink()


FILES = ["manifest.json", "state.json", "random_00000.json", "trainer_00000.safetensors", "loop_00000.safetensors"]


def test_what_the_loop_wants_back_on_a_rank_is_in_a_file_of_its_own(saved: Path, tmp_path: Path) -> None:
    (file,) = checkpoint.loop_files(saved / "step_000002")
    found = load_file(file)
    assert found["tokens"].tolist() == [*range(2, 11)] and found["none"].shape == (0, 2)
    trainer = PolicyTrainer(make_policy(), None, make_config(), Accelerator(cpu=True))
    checkpoint.save(tmp_path, 1, trainer, {}, keep_last=1)
    assert checkpoint.loop_files(tmp_path / "step_000001") == []


@pytest.mark.parametrize("kind", ["flip", "zero", "swap", "cut", "append", "delete"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_refused_by_its_file_or_the_damage_means_nothing(
    saved: Path, tmp_path: Path, name: str, kind: str
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    second = tmp_path / "step_000002"
    (second / "trainer_00000.safetensors.bak").write_text("somebody's own")
    expected, original = resumed_from(second), (second / name).read_bytes()
    rng = random.Random(f"{name} {kind}")
    for _ in range(4):
        damage(second / name, kind, rng)
        try:
            assert resumed_from(second) == expected
        except UserError as error:
            assert re.match(rf"resume: '{second}/{name}' cannot be used: .*; move '{second}' away", str(error))
            assert str(error).endswith("to resume from step_000001")
        else:
            assert name == "manifest.json" or (second / name).read_bytes() == original  # of spaces, or with itself
        (second / name).write_bytes(original)
    shutil.rmtree(tmp_path / "step_000001")
    (second / name).unlink()
    with pytest.raises(UserError, match="it is the only one: start anew"):
        resumed_from(second)


def test_files_of_different_steps_and_files_left_over_are_refused(saved: Path, tmp_path: Path) -> None:
    for name in FILES[1:]:
        mixed = shutil.copytree(saved / "step_000002", tmp_path / name / "step_000002")
        shutil.copy(saved / "step_000001" / name, mixed)
        with pytest.raises(UserError, match=rf"/{name}' cannot be used: "):
            resumed_from(mixed)
    renamed = shutil.copytree(saved / "step_000001", tmp_path / "step_000002")
    with pytest.raises(UserError, match=r"/manifest\.json' cannot be used: it is of step 1, not of the one in"):
        resumed_from(renamed)
    for name in ("trainer_00001.safetensors", "random_00001.json", "loop_00001.safetensors"):
        more = shutil.copytree(saved / "step_000002", tmp_path / f"with {name}" / "step_000002")
        (more / name).write_bytes(b"of another run")
        with pytest.raises(UserError, match=rf"/{name}' cannot be used: it is none of the files that were written"):
            resumed_from(more)


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_and_the_one_before(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    trainer = PolicyTrainer(make_policy(), None, make_config(), Accelerator(cpu=True))
    checkpoint.load(tmp_path / "step_000002", trainer)
    (tmp_path / ".step_000007.partial").mkdir()  # of a run that was killed

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, name in ((os, "write"), (Path, "write_text"), (os, "fsync")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, full)
            words = rf"checkpoint '{tmp_path}/step_000003' cannot be written: .*No space left.*; free some room, then"
            with pytest.raises(UserError, match=words):
                checkpoint.save(tmp_path, 3, trainer, {}, keep_last=1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]
    checkpoint.save(tmp_path, 3, trainer, {}, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]
    with pytest.raises(UserError, match=r"cannot be written: .*No such file"):
        checkpoint.save(tmp_path / "run that was deleted" / "checkpoints", 3, trainer, {}, keep_last=1)


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, [5e-3, 2.5e-3]),
        ({"learning_rate": 3e-2}, [1.5e-2, 7.5e-3]),
        ({"schedule": "constant"}, [1e-2, 1e-2]),
        ({"schedule": "cosine"}, [5e-3, (1 - 2**-0.5) / 2 * 1e-2]),
        ({"steps": 6}, [1e-2 * 16 / 24, 1e-2 * 12 / 24]),
        ({"warmup_updates": 16}, [5e-3, 7.5e-3]),
        ({"updates_per_rollout": 1}, [2e-3, 1e-3]),  # of ten updates eight are done
    ],
)
def test_the_learning_rate_goes_on_as_the_config_says_now(
    tmp_path: Path, changes: dict[str, Any], rates: list[float]
) -> None:
    first = PolicyTrainer(make_policy(), None, make_config(schedule="linear"), Accelerator(cpu=True))
    for step in (1, 2):
        first.train_on(make_groups(step), contextlib.nullcontext)
    checkpoint.save(tmp_path, 2, first, {}, keep_last=1)
    config = make_config(**{"schedule": "linear", **changes})
    second = PolicyTrainer(make_policy(), None, config, Accelerator(cpu=True))
    checkpoint.load(tmp_path / "step_000002", second)
    assert [group["lr"] for group in second.parallel.optimizer.param_groups] == pytest.approx([rates[0]] * 2)
    assert second.train_on(make_groups(3), contextlib.nullcontext)["policy/learning_rate"] == pytest.approx(rates[1])


def test_a_folder_of_checkpoints_that_was_deleted_in_mid_run_is_made_again(tmp_path: Path) -> None:
    trainer = PolicyTrainer(make_policy(), None, make_config(), Accelerator(cpu=True))
    checkpoint.save(tmp_path / "checkpoints", 1, trainer, {}, keep_last=2)
    shutil.rmtree(tmp_path / "checkpoints")
    checkpoint.save(tmp_path / "checkpoints", 2, trainer, {}, keep_last=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000002"]


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
            checkpoint.check(tmp_path / "step_000001", changed, trainer.accelerator)


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
        found, expected = (trainer.train_on(make_groups(step), contextlib.nullcontext) for trainer in trainers)
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
        trainer.train_on(groups, contextlib.nullcontext)
    moved = (weights_of(trainer)[name] - start).abs()
    assert moved.max() == pytest.approx(steps * rate, rel=0.05)  # Adam's steps on the same batch all have one size
    half = start.bfloat16()
    assert (half + rate).eq(half).float().mean() > 0.98


def weights_of(trainer: PolicyTrainer) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in trainer.policy.named_weights()}


@pytest.mark.parametrize("old_logps", ["recompute", "rollout"])
@pytest.mark.parametrize("budget", [1000, 20])
def test_m2po_masks_what_the_whole_mini_batch_has_drifted_too_far(old_logps: str, budget: int) -> None:
    """At the third update on the same samples: the largest squares are out, until the mean of the rest is within."""
    config = make_config(tokens_per_micro_batch=budget, updates_per_rollout=3, mini_batches=1)
    config.loss = LossConfig(name="m2po", m2_threshold=0.02, old_logps=old_logps, loss_agg_mode="token-mean")
    config.logging.tokens = True
    trainer = PolicyTrainer(make_policy(), None, config, Accelerator(cpu=True))
    metrics = trainer.train_on(with_rollout_logps(shift=0.05), contextlib.nullcontext)
    told = {name: np.concatenate([one.columns[name] for one in trainer.tokens]) for name in trainer.tokens[0].columns}
    moved = told["logps"].astype(float) - told["old_logps"]
    advantages = np.concatenate([np.full(len(one.columns["logps"]), one.advantage) for one in trainer.tokens])
    region, kept = moved * advantages > 0, told["gradient_weight"] == 1
    left, out = np.sort(moved[region & kept] ** 2), np.sort(moved[region & ~kept] ** 2)
    assert kept[~region].all() and len(left) and len(out)
    assert left[-1] < out[0]
    assert left.mean() <= 0.02 < np.append(left, out[0]).mean()
    assert metrics["policy/weight_mean_against"] == 1


BATCH_LOSS = """
from dataclasses import dataclass
import torch
from sapo_rl.losses import BatchPolicyLossFn, TokenLosses

told = []

@dataclass
class Told(BatchPolicyLossFn):
    def batch_limit(self, log_ratios, advantages, across=None):
        told.append((log_ratios, advantages))
        return log_ratios.abs().sum()

    def within(self, log_ratios, advantages, limit):
        return TokenLosses(-log_ratios.exp() * advantages, torch.ones_like(advantages))
"""


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_loss_of_the_whole_batch_is_told_the_ratios_that_its_parts_get_and_no_filler(
    level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes over two mini-batches, of which the second teaches nothing."""
    module = f"batch_loss_of_{level}s"
    (tmp_path / f"{module}.py").write_text(BATCH_LOSS)
    monkeypatch.syspath_prepend(tmp_path)
    config = make_config(tokens_per_micro_batch=20, updates_per_rollout=4, mini_batches=2)
    config.loss = LossConfig(name=f"{module}.Told", ratio_level=level)
    config.logging.tokens = True
    trainer = trainer_of(config)
    trainer.train_on(make_groups(3, zero_spread=4), contextlib.nullcontext)
    first, _, second, _ = told = importlib.import_module(module).told
    assert [len(log_ratios) for log_ratios, _ in told] == 2 * [
        sum(len(one.columns["ratio"]) for one in trainer.tokens),
        0,
    ]
    assert not first[0].any()
    expected = [one.columns["logps"].astype(float) - one.columns["old_logps"] for one in trainer.tokens]
    if level == "sequence":
        expected = [np.full(len(one), one.mean()) for one in expected]
    np.testing.assert_allclose(second[0], np.concatenate(expected), rtol=0, atol=1e-5)
    of_tokens = [np.full(len(one.columns["ratio"]), one.advantage) for one in trainer.tokens]
    np.testing.assert_allclose(second[1], np.concatenate(of_tokens), rtol=1e-6)


def budget_config(target: float | None, **loss: Any) -> Config:
    config = make_config(updates_per_rollout=4, mini_batches=1)
    config.loss = LossConfig(tau_target_kl=target, **loss)
    config.logging.tokens = True
    return config


def steps_of(trainer: PolicyTrainer, seeds: range) -> list[dict[str, float]]:
    return [trainer.train_on(make_groups(seed), contextlib.nullcontext) for seed in seeds]


def trainer_of(config: Config) -> PolicyTrainer:
    return PolicyTrainer(make_policy(), None, config, Accelerator(cpu=True))


def test_a_budget_that_never_binds_is_bit_for_bit_none() -> None:
    plain, bounded = trainer_of(budget_config(None)), trainer_of(budget_config(1e9))
    expected, found = steps_of(plain, range(3)), steps_of(bounded, range(3))
    for one, other in zip(found, expected, strict=True):
        assert one.pop("policy/kl_gated") > 0
        assert (one.pop("policy/tau_pos"), one.pop("policy/tau_neg")) == (1.0, 1.05)
        assert one == other
    for name, weight in weights_of(plain).items():
        assert torch.equal(weight, weights_of(bounded)[name]), name


def test_temperatures_follow_the_gated_kl_of_the_step_before() -> None:
    """Half the way in the logarithm, both by the same factor, within 1 and 64."""
    trainer = trainer_of(budget_config(1e-4))
    free = trainer_of(budget_config(None))
    found, unbounded = steps_of(trainer, range(4)), steps_of(free, range(4))
    assert found[0]["policy/tau_pos"] == 1 and found[0]["policy/kl_gated"] > 1e-4
    assert found[0]["policy/kl_gated"] <= found[0]["policy/kl_old_k3"]
    assert found[1]["policy/tau_pos"] > 1
    for one in found:
        assert one["policy/tau_neg"] == pytest.approx(1.05 * one["policy/tau_pos"], rel=1e-12)
        assert 1 <= one["policy/tau_pos"] <= 64
    assert found[-1]["policy/kl_gated"] < unbounded[-1]["policy/kl_old_k3"]
    assert found[-1]["policy/weight_mean_pos"] < unbounded[-1]["policy/weight_mean_pos"]


def test_a_resumed_run_has_the_temperatures_that_it_would_have_had(tmp_path: Path) -> None:
    through = trainer_of(budget_config(1e-4))
    steps_of(through, range(2))
    checkpoint.save(tmp_path / "checkpoints", 2, through, {}, keep_last=1)
    expected = steps_of(through, range(2, 4))
    resumed = trainer_of(budget_config(1e-4))
    checkpoint.load(latest_checkpoint(tmp_path / "checkpoints"), resumed)
    assert resumed.temperatures.scale > 1
    assert steps_of(resumed, range(2, 4)) == expected
    for name, weight in weights_of(through).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name
