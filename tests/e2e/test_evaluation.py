"""Sets of held-out prompts in a run and in `sapo-eval`: real vLLM on the CPU, a tiny random model, float32."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import forked
import pandas as pd
import pytest
from command import records
from tiny import make_workspace

from sapo_rl.run.subjects import subject_at

pytestmark = pytest.mark.e2e

ROWS = [{"ask": f"How many are {n} and {n}?", "answer": str(2 * n)} for n in range(6)]
REWARDS = """
def even(completions, **columns):
    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]
"""
SET = {
    "data": {"path": "own.jsonl", "prompt_column": "ask", "max_prompt_tokens": 96, "system_prompt": "Count."},
    "functions": {"even": {"function": "my_rewards.even"}, "right": {"function": "numeric_answer"}},
    "reward": "even",
    "samples": 4,
    "temperature": 0.7,
    "max_completion_tokens": 14,
    "prompts": 5,
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = make_workspace(
        tmp_path_factory.mktemp("workspace"),
        tiny_model,
        REWARDS,
        trainer={"steps": 2},
        eval={"every": 1, "prompts": 6, "samples": 2, "sets": {"own": SET}},
        checkpoint={"every": 1, "keep_best": "eval/own/avg@4"},
        logging={"wandb": "off"},
    )
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture(scope="module")
def whole(workspace: Path) -> Path:
    return forked.new_run(workspace)


@pytest.fixture(scope="module")
def measured(workspace: Path, whole: Path, tiny_model: Path) -> tuple[Path, str]:
    """The results of the final model, which vLLM loads by itself, of both checkpoints, and of the first model."""
    named = f"model={whole},{whole}/checkpoints,{tiny_model}"
    how: dict[str, Any] = {"module": "sapo_rl.run.eval", "begin": forked.launch}
    code, out, err = forked.run(workspace, named, "run_dir=results", **how)
    assert code == 0, out + err
    return workspace / "results", out


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if name.startswith("eval/")}
        for record in records(folder)
        if "eval/reward" in record
    ]


def test_a_run_measures_every_set_at_every_evaluation(whole: Path) -> None:
    found = evaluations(whole)
    assert len(found) == 3
    own = {"reward", "avg@4", "pass@2", "pass@4", "mean_length", "clipped_ratio", "rewards/even", "rewards/right"}
    default = {"reward", "avg@2", "pass@2", "mean_length", "clipped_ratio"}
    expected = {f"eval/own/{name}" for name in own} | {f"eval/{name}" for name in default}
    assert all(set(one) == expected for one in found)
    for step, one in enumerate(found):
        rows = pd.read_parquet(whole / "completions" / f"eval_{step:05d}.parquet")
        greedy, sampled = (rows[(rows.set == "own") & (rows.greedy == kind)] for kind in (True, False))
        assert (len(greedy), len(sampled), len(rows[rows.set == "default"])) == (5, 20, 18)
        assert one["eval/own/reward"] == pytest.approx(greedy.reward.mean())
        assert one["eval/own/avg@4"] == pytest.approx(sampled.reward.mean())
        solved = sampled.groupby("prompt_index").reward.sum()
        assert one["eval/own/pass@4"] == pytest.approx((solved > 0).mean())
        none = [math.comb(4 - int(count), 2) / math.comb(4, 2) for count in solved]
        assert one["eval/own/pass@2"] == pytest.approx(1 - sum(none) / 5)
        assert greedy.tokens.max() <= 14 and rows[rows.set == "default"].tokens.max() <= 8
        assert sampled.groupby("prompt_index").completion.nunique().max() > 1


def test_the_trained_model_has_a_card_with_its_evaluations(whole: Path) -> None:
    card = (whole / "final/README.md").read_text()
    assert f"| 2 | {evaluations(whole)[2]['eval/reward']:.4g} |" in card and f"# {whole.name}" in card


def test_the_checkpoint_of_the_best_evaluation_has_a_link(whole: Path) -> None:
    _, first, second = (one["eval/own/avg@4"] for one in evaluations(whole))
    step = 1 if first >= second else 2
    assert subject_at(str(whole / "checkpoints/best")) == subject_at(str(whole / f"checkpoints/step_{step:06d}"))


def test_checkpoints_and_models_measured_afterwards_give_the_numbers_of_the_run(
    whole: Path, measured: tuple[Path, str]
) -> None:
    folder, printed = measured
    results = json.loads((folder / "results.json").read_text())["models"]
    before, first, second = evaluations(whole)
    for one, expected in zip(results, [second, first, second, before], strict=True):
        assert one["sets"]["default"]["metrics"] | one["sets"]["own"]["metrics"] == expected, one["model"]
    assert [one["step"] for one in results] == [2, 1, 2, 0]
    assert printed.count("vLLM is ready") == 1


def test_results_have_intervals_and_every_prompt_and_completion(measured: tuple[Path, str]) -> None:
    folder, printed = measured
    content = json.loads((folder / "results.json").read_text())
    prompts = pd.read_parquet(folder / "prompts.parquet")
    assert len(prompts) == 4 * (6 + 5) and set(prompts.set) == {"default", "own"}
    for number, one in enumerate(content["models"]):
        own = prompts[(prompts.model == one["model"]) & (prompts.set == "own")]
        for name, estimate in one["sets"]["own"]["estimates"].items():
            assert estimate["value"] == pytest.approx(own[name].mean())
            assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
            assert f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]" in printed
        (file,) = (folder / "completions").glob(f"{number:03d}_*.parquet")
        assert len(pd.read_parquet(file)) == 6 * 3 + 5 * 5
    change = next(
        one for one in content["changes"] if one["set"] == "own" and one["model"] == content["models"][3]["model"]
    )
    first, last = (prompts[(prompts.model == content["models"][n]["model"]) & (prompts.set == "own")] for n in (0, 3))
    difference = last["avg@4"].to_numpy() - first["avg@4"].to_numpy()
    assert change["estimates"]["avg@4"]["value"] == pytest.approx(difference.mean())
    half = 1.959964 * difference.std(ddof=1) / math.sqrt(5)
    assert change["estimates"]["avg@4"]["high"] == pytest.approx(difference.mean() + half)
    for name in ("config.yaml", "models.json", "environment.json", "overrides.yaml", "logs/vllm_rank0.log"):
        assert (folder / name).is_file(), name


def test_a_damaged_checkpoint_is_refused_before_vllm_starts(workspace: Path, whole: Path) -> None:
    file = whole / "checkpoints/step_000001/trainer_00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-8] + b"\0" * 8)
    how: dict[str, Any] = {"module": "sapo_rl.run.eval", "begin": forked.launch}
    code, _, err = forked.run(workspace, f"model={file.parent}", "run_dir=damaged", **how)
    file.write_bytes(content)
    assert code == 2 and err == f"sapo-eval: '{file}' cannot be used: it is damaged, its checksum differs\n"
    assert not (workspace / "damaged/logs/vllm_rank0.log").exists()
