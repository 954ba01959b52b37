"""Functions of verl's form, and its data, as they are."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rewards.groups import group, rewards
from tiny import make_tokenizer

from sapo_rl.config import DataConfig, RewardConfig, RewardFunctionConfig
from sapo_rl.data import build_prompts, load_rows
from sapo_rl.errors import UserError
from sapo_rl.rewards import RewardPool, check_function
from sapo_rl.rewards.verl import with_lists

# After verl's utils/reward_score: one function that picks by the data's source, and one that returns a dictionary.
MODULE = """
import asyncio
import re

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if data_source != "openai/gsm8k":
        raise NotImplementedError(f"Reward function is not implemented for {data_source=}")
    found = re.findall("#### (-?[0-9.,]+)", solution_str)
    return 0.0 if not found else 1.0 if found[-1] == ground_truth else extra_info.get("format_score", 0.1)

def by_name(data_source, solution_str, ground_truth, extra_info, strict=False):
    correct = solution_str == ground_truth
    return {"score": 1.0 if correct else -1.0, "acc": correct, "length": len(solution_str), "pred": solution_str}

async def asks(data_source, solution_str, ground_truth, extra_info):
    await asyncio.sleep(0.01)
    return {"acc": 1.0} if solution_str == "no score" else float(solution_str == ground_truth)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "verl_rewards.py").write_text(MODULE)
    return tmp_path


def config(**functions: dict) -> RewardConfig:
    return RewardConfig(
        {
            name: RewardFunctionConfig(f"verl_rewards.{name}", style="verl", **settings)
            for name, settings in functions.items()
        }
    )


def test_its_parquet_is_read_and_scored_as_it_is(here: Path) -> None:
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"What is {number} + 1?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
            "extra_info": {"split": "train", "index": number, "format_score": 0.25},
        }
        for number in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), here / "train.parquet")
    data = DataConfig(source="file", path="train.parquet", answer_column="reward_model.ground_truth")
    prompts, _ = build_prompts(load_rows(data, 0)[0], data, make_tokenizer())
    assert prompts[2].content == rows[2]["prompt"]
    texts = ["So it is #### 3", "#### 4", "3"]
    groups = [group(prompts[2].index, texts, **prompts[2].columns)]
    with RewardPool(config(compute_score={})) as pool:
        pool.check_columns(prompts[2].columns, "the data")
        assert rewards(pool.score(groups).groups, "compute_score") == [[1.0, 0.25, 0.0]]
        told = r"compute_score' .*: NotImplementedError: .*data_source='mine' \(.*verl_rewards\.py:7\)"
        with pytest.raises(UserError, match=told):
            pool.score([group(0, ["a"], data_source="mine", answer="b")])
        with pytest.raises(UserError, match=r"'compute_score' .* needs 'answer', which is no column of the data"):
            pool.check_columns(["data_source", "reward_model"], "the data")


def test_further_numbers_of_a_dictionary_are_recorded_under_the_functions_name() -> None:
    functions = config(by_name={"args": {"strict": True}}, asks={"on_error": "zero"})
    with RewardPool(functions) as pool:
        (scored,), stats = pool.score([group(0, ["7", "80", "no score"], answer="7")])
    assert [sample.rewards for sample in scored.samples] == [
        {"by_name": 1.0, "asks": 1.0, "by_name/acc": 1.0, "by_name/length": 1.0},
        {"by_name": -1.0, "asks": 0.0, "by_name/acc": 0.0, "by_name/length": 2.0},
        {"by_name": -1.0, "asks": 0.0, "by_name/acc": 0.0, "by_name/length": 8.0},
    ]
    assert stats.errors == {"by_name": 0, "asks": 1}
    assert "which lacks the key 'score'" in stats.failures["asks"]


def test_where_one_sample_of_a_coroutine_function_fails_the_calls_for_the_others_end() -> None:
    ended: list[str] = []

    async def compute_score(
        data_source: None, solution_str: str, ground_truth: str, extra_info: dict[str, int]
    ) -> float:
        try:
            await asyncio.sleep(0.01 if solution_str == "bad" else 600)
        finally:
            ended.append(solution_str)
        raise ValueError("no score")

    async def score() -> None:
        with pytest.raises(ValueError, match="no score"):
            await with_lists(compute_score, {})(["a", "bad", "b"], ["7", "7", "7"])
        assert sorted(ended) == ["a", "b", "bad"]

    asyncio.run(score())


def test_what_cannot_be_called_so_is_refused() -> None:
    with pytest.raises(UserError, match=r"args\.stric: unknown argument; did you mean 'strict'\? valid: strict$"):
        RewardPool(config(by_name={"args": {"stric": True}})).__enter__()
    with pytest.raises(UserError, match=r"reward\.functions\.f\.args: 'ground_truth' is filled in at every call"):
        check_function("f", RewardFunctionConfig("verl_rewards.asks", style="verl", args={"ground_truth": 1}))
    with pytest.raises(UserError, match=r"reward\.functions\.f\.scope: is group, but with style=verl"):
        check_function("f", RewardFunctionConfig("verl_rewards.asks", style="verl", scope="group"))
    with pytest.raises(UserError, match=r"reward\.functions\.f\.style: verl is for functions of your own; 'regex'"):
        check_function("f", RewardFunctionConfig("regex", style="verl", args={"pattern": "a"}))
