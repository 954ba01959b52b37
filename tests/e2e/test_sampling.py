"""What is sampled, with real vLLM: pass rates measured before a run, and a run that draws by them and replays."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

import forked
import pyarrow.parquet as pq
import pytest
import torch
from command import steps_of, timeless
from safetensors.torch import load_file
from tiny import PLAIN, make_workspace

from sapo_rl.data.pass_rates import fingerprint

pytestmark = pytest.mark.e2e

REWARDS = """
def lucky(completions, **columns):
    # Never, always or in part, by the answer.
    print("scored", len(completions))
    parities = [sum(map(ord, text)) % 2 for text in completions]
    return [float((0, 1, odd, odd)[int(answer) % 4]) for odd, answer in zip(parities, columns["answer"])]
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_workspace(
        tmp_path_factory.mktemp("workspace"),
        tiny_model,
        REWARDS,
        data={"size": 24},
        reward={
            "functions": {
                "lucky": {"function": "my_rewards.lucky"},
                "odd": {"function": "my_rewards.odd", "weight": 0.0},
            }
        },
        eval={"every": 0, "prompts": 4, "reward": "lucky"},
        checkpoint={"every": 1, "keep_last": 3, "save_final": False},
        logging={"wandb": "off"},
    )


@pytest.fixture(scope="module")
def checked(workspace: Path) -> tuple[Path, str]:
    """The folder of a check of all prompts, and what it printed."""
    check = ("check=data", "data.check.samples=6", "run_dir=checked", PLAIN)
    code, out, err = forked.run(workspace, "config=tiny.yaml", *check)
    assert code == 0, out + err
    return workspace / "checked", out


def rates_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "pass_rates.parquet").to_pylist()


def drawn_in(folder: Path, step: int) -> set[int]:
    """The prompts whose groups a step was trained on."""
    return set(pq.read_table(folder / f"completions/step_{step:05d}.parquet")["prompt_index"].to_pylist())


def test_every_prompt_is_measured_and_every_number_is_that_of_its_samples(checked: tuple[Path, str]) -> None:
    folder, out = checked
    rows, samples = rates_of(folder), pq.read_table(folder / "completions/step_00000.parquet").to_pylist()
    assert [row["prompt_index"] for row in rows] == list(range(24)) and len(samples) == 24 * 6
    for row in rows:
        own = [one for one in samples if one["prompt_index"] == row["prompt_index"]]
        assert row["fingerprint"] == fingerprint(row["prompt"]) and row["samples"] == 6
        assert row["pass_rate"] == statistics.fmean(one["rewards/lucky"] >= 1 for one in own)
        assert row["rewards/odd/mean"] == pytest.approx(statistics.fmean(one["rewards/odd"] for one in own))
        assert row["reward/mean"] == row["rewards/lucky/mean"] == row["pass_rate"]
        assert row["mean_length"] == statistics.fmean(one["tokens"] for one in own)
    table = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in out.splitlines() if "│" in line}
    rates = [row["pass_rate"] for row in rows]
    assert int(table["always"]) == rates.count(1) > 0
    assert int(table["never"]) == rates.count(0) > 0
    assert (
        0 < sum(int(count) for name, count in table.items() if " to " in name) == 24 - rates.count(0) - rates.count(1)
    )
    assert table["prompts"] == "24 of 24, with 144 samples"
    assert table["mean pass rate"] == f"{statistics.fmean(rates):.3f}"
    assert (folder / "logs/rewards_rank0.log").read_text().count("scored 6\n") == 24
    assert "Traceback" not in out and not list(folder.glob("checkpoints")) and not list(folder.glob("metrics.jsonl"))


BY_RATES = (
    "data.sampling=pass_rate",
    "data.pass_rate.path=checked",
    "data.pass_rate.floor=0.01",
    "rollout.group_size=2",
    "rollout.refill.max_extra=0.25",
    "rollout.replay={size: 8, max_age: 2}",
    "rollout.logprobs=true",
    "loss.correction.mode=token_truncate",
    "trainer.steps=5",
)
"""Groups of two are flat half of the time: some are replaced by further prompts, some by groups of earlier steps."""


@pytest.fixture(scope="module")
def whole(workspace: Path, checked: tuple[Path, str]) -> Path:
    return forked.new_run(workspace, *BY_RATES)


def test_a_run_draws_what_is_neither_always_nor_never_solved_and_remembers_what_it_saw(
    whole: Path, checked: tuple[Path, str]
) -> None:
    before = {row["prompt_index"]: row["pass_rate"] for row in rates_of(checked[0])}
    drawn = [index for step in range(1, 6) for index in drawn_in(whole, step)]
    assert len(drawn) == 5 * 8
    assert (
        sum(0 < before[index] < 1 for index in drawn)
        > 0.75 * len(drawn)
        > len(drawn) * statistics.fmean(0 < rate < 1 for rate in before.values())
    )
    after, last = rates_of(whole), steps_of(whole)[-1]
    rates = [row["pass_rate"] for row in after]
    written = sum(8 / record["rollout/kept_fraction"] for record in steps_of(whole))
    assert [row["prompt_index"] for row in after] == [*before] and written > 5 * 8
    assert sum(row["samples"] for row in after) == pytest.approx(24 * 6 + written * 2)  # replaced groups count, too
    assert last["data/known_fraction"] == 1
    assert last["data/pass_rate_mean"] == pytest.approx(statistics.fmean(rates))
    assert last["data/always_solved_fraction"] == rates.count(1) / 24
    assert last["data/never_solved_fraction"] == rates.count(0) / 24
    weights = [max(0.01, 4 * rate * (1 - rate)) for rate in rates]
    assert last["data/effective_prompts"] == pytest.approx(sum(weights) ** 2 / sum(one**2 for one in weights))


def test_groups_of_earlier_steps_fill_the_places_of_those_that_teach_nothing(whole: Path) -> None:
    kept: dict[int, int] = {}
    for record in steps_of(whole):
        step, flat = record["step"], round(8 * record["group/zero_spread_fraction"])
        there = sum(count for earlier, count in kept.items() if step - earlier <= 2)
        assert record["rollout/replayed_fraction"] == min(flat, there) / 8
        assert 1 <= record.get("rollout/replay_age", 1) <= min(2, step - 1) or not there
        assert record["rollout/staleness"] == 0  # of what this step has written
        kept[step] = 8 - flat
        while sum(kept.values()) > 8:  # the oldest leave
            oldest = next(iter(kept))
            kept[oldest] = kept[oldest] - 1
            kept = {key: count for key, count in kept.items() if count}
    assert sum(record["rollout/replayed_fraction"] for record in steps_of(whole)) > 0


def test_one_that_ended_after_three_steps_and_is_resumed_draws_the_same_to_the_last_bit(
    workspace: Path, whole: Path, tmp_path: Path
) -> None:
    gone = shutil.ignore_patterns("step_000004", "step_000005", "pass_rates.parquet")
    folder = shutil.copytree(whole, tmp_path / "copy", symlinks=True, ignore=gone)
    (workspace / "checked").rename(workspace / "gone")  # what a run began with is in its checkpoints
    code, out, err = forked.run(workspace, f"resume={folder}")
    (workspace / "gone").rename(workspace / "checked")
    assert code == 0, out + err
    assert timeless(folder) == timeless(whole)
    assert rates_of(folder) == rates_of(whole)
    ours, theirs = (load_file(one / "checkpoints/step_000005/trainer_00000.safetensors") for one in (folder, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
