"""Sets of held-out prompts: who judges them, and where their prompts come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from tiny import make_tokenizer

from sapo_rl.config import Config, DataConfig, EnvironmentConfig, RewardFunctionConfig
from sapo_rl.config.evaluation import EvalDataConfig, EvalSetConfig
from sapo_rl.data import load_rows, load_set
from sapo_rl.errors import UserError
from sapo_rl.evaluation.sets import comparison_warnings, further_functions, jury, named_sets, set_warnings
from sapo_rl.rewards.lookup import resolve
from sapo_rl.run import eval_sets
from sapo_rl.types import Prompt

ROWS = [{"question": f"What is {n}?", "answer": str(n)} for n in range(20)]
EXACT = {"exact": RewardFunctionConfig("exact_match")}


def config(tmp_path: Path, system: str | None = None, **settings: Any) -> Config:
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"prompt_column": "question", "path": str(file)} | settings.pop("data", {})
    found = Config(data=DataConfig("arithmetic", system_prompt=system, max_prompt_tokens=200))
    found.eval.sets = {"own": EvalSetConfig(data=EvalDataConfig(**data), **settings)}
    found.reward.functions = {"training": RewardFunctionConfig("numeric_answer")}
    return found


def prompts(cfg: Config) -> list[Prompt]:
    (found,) = named_sets(cfg, make_tokenizer())
    return found.prompts


def test_all_rows_are_taken_or_a_choice_that_depends_on_the_split_seed_alone(tmp_path: Path) -> None:
    assert [prompt.columns["answer"] for prompt in prompts(config(tmp_path))] == [row["answer"] for row in ROWS]
    some = config(tmp_path, prompts=5)
    chosen = [prompt.index for prompt in prompts(some)]
    assert len(chosen) == 5
    some.seed = 3
    assert [prompt.index for prompt in prompts(some)] == chosen
    some.data.split_seed = 3
    assert [prompt.index for prompt in prompts(some)] != chosen


def test_prompts_are_worded_as_in_training_but_for_what_the_set_says(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()

    def first(cfg: Config) -> str:
        return tokenizer.decode(prompts(cfg)[0].token_ids)

    asked = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 0?<|im_end|>\n<|im_start|>assistant\n"
    assert first(config(tmp_path, "Be brief.")) == asked
    own = {"system_prompt": "", "template": "Say: {prompt}", "response_prefix": "<think>"}
    worded = "<|im_start|>user\nSay: What is 0?<|im_end|>\n<|im_start|>assistant\n<think>"
    assert first(config(tmp_path, "Be brief.", data=own)) == worded


def test_an_episode_begins_with_the_system_prompt_of_its_set(tmp_path: Path) -> None:
    same, other, none = (
        config(tmp_path, "Be brief.", data=own) for own in ({}, {"system_prompt": "Play."}, {"system_prompt": ""})
    )
    for cfg in (same, other, none):
        cfg.environment = EnvironmentConfig("guess")
    user = {"role": "user", "content": "What is 0?"}
    assert prompts(same)[0].content == "What is 0?"  # the episode puts the training's before it
    assert prompts(other)[0].content == [{"role": "system", "content": "Play."}, user]
    assert prompts(none)[0].content == [user]


def test_a_generator_makes_other_prompts_than_those_to_train_on() -> None:
    cfg = DataConfig("reasoning_gym", path="chain_sum", args={"min_digits": 4, "max_digits": 4})
    rows = load_set(cfg, 10)
    assert len(rows) == 10 and load_set(replace(cfg, split_seed=1), 10) != rows == load_set(cfg, 10)
    train, held_out = load_rows(cfg, 10)
    known = {row["prompt"] for row in [*train.values(), *held_out.values()]}
    assert not known & {row["prompt"] for row in rows.values()}
    with pytest.raises(UserError, match=r"^eval\.prompts: must be given; reasoning_gym makes as many prompts"):
        load_set(cfg, None)


def test_errors_of_a_set_name_its_keys(tmp_path: Path) -> None:
    def refused(cfg: Config) -> str:
        with pytest.raises(UserError) as error:
            prompts(cfg)
        return str(error.value)

    assert refused(config(tmp_path, data={"prompt_column": "ask"})).startswith("eval.sets.own.data.prompt_column: the")
    assert refused(config(tmp_path, data={"path": "gone.jsonl"})).startswith("eval.sets.own.data.path: there is no")
    longest = refused(config(tmp_path, data={"max_prompt_tokens": 3}))
    assert longest.startswith("eval.sets.own.data.max_prompt_tokens: all 20 prompts are longer than 3 tokens")
    made = config(tmp_path, data={"source": "arithmetic"})
    assert refused(made) == "eval.sets.own.prompts: must be given; arithmetic makes as many prompts as it is asked for"
    other = config(tmp_path, data={"answer_column": "reply"})
    assert refused(other).startswith("eval.sets.own.data.answer_column: the data has no column 'reply'")


def test_prompts_that_are_left_out_or_trained_on_are_told(tmp_path: Path) -> None:
    cfg = config(tmp_path, data={"max_prompt_tokens": len("<user\nWhat is 9?<\n<assistant\n")})
    (found,) = named_sets(cfg, make_tokenizer())
    assert (len(found.prompts), found.left_out) == (10, 10)
    told = set_warnings([found], [Prompt(7, [1], "What is 4?", {}), Prompt(8, [1], "What is 12?", {})])
    assert told == [
        "eval.sets.own: 10 prompts are longer than its max_prompt_tokens: they are left out",
        "eval.sets.own: 1 of its 10 prompts are trained on too",
    ]


def test_a_set_is_judged_by_its_own_functions_or_those_of_the_training(tmp_path: Path) -> None:
    own = jury(config(tmp_path, functions=EXACT), "own")
    assert own.functions == {"eval.sets.own.functions.exact": "exact"} and own.judge == "exact" and not own.voter
    assert own.further == {"eval.sets.own.functions.exact": EXACT["exact"]}
    shared = jury(config(tmp_path, samples=4), "own")
    assert shared.functions == {"training": "training"} and shared.judge == "training"
    assert shared.voter == "eval.sets.own.votes" and shared.further[shared.voter].scope == "group"


def test_answers_are_compared_only_where_a_built_in_can_and_there_are_several(tmp_path: Path) -> None:
    for function, samples, wanted in (("exact_match", 1, False), ("exact_match", 2, True), ("regex", 2, False)):
        cfg = config(tmp_path, samples=samples, functions={"one": RewardFunctionConfig(function)})
        assert ("eval.sets.own.votes" in further_functions(cfg)) is wanted


def test_an_evaluation_by_a_function_that_compares_groups_is_told(tmp_path: Path) -> None:
    cfg = config(tmp_path, functions={"order": RewardFunctionConfig("my_module.order", scope="group"), **EXACT})
    cfg.reward.functions = {"rank": RewardFunctionConfig("my_module.rank", scope="group"), **EXACT}
    whole, own = comparison_warnings(cfg)
    assert whole.startswith("eval.reward: rank is of scope group, and eval/reward is its mean over single replies")
    assert "look at eval/own/avg@8 with eval.sets.own.samples=8" in own
    cfg.eval.reward = cfg.eval.sets["own"].reward = "exact"
    assert comparison_warnings(cfg) == []


HUB = {
    "gsm8k": [
        {"question": "Ann has 3 pens and buys 4. How many has she?", "answer": "3 + 4 = <<3+4=7>>7 pens.\n#### 7"},
        {"question": "A car costs $1,200, and 2 cost?", "answer": "2 * 1,200 = $<<2*1200=2400>>2,400\n#### 2,400"},
    ],
    "math500": [
        {
            "problem": f"What is half of ${number}$?",
            "solution": f"It is $\\boxed{{{answer}}}$.",
            "answer": answer,
            "subject": "Algebra",
            "level": 2,
            "unique_id": f"test/algebra/{number}.json",
        }
        for number, answer in ((3, "\\frac{3}{2}"), (4, "2"))
    ],
    "aime2025": [{"problem": f"Find ${n}+{n}$.", "answer": str(2 * n), "id": str(n)} for n in (35, 294)],
}
"""Two rows as each shipped set has them on the hub."""
RIGHT = {
    "gsm8k": ["She has 7.", "Together 2400"],
    "math500": ["So \\boxed{1.5}", "\\boxed{2}"],
    "aime2025": ["\\boxed{70}", "It is \\boxed{588}."],
}


@pytest.mark.parametrize("name", HUB)
def test_rows_as_the_hub_has_them_are_asked_and_judged_by_the_shipped_sets(tmp_path: Path, name: str) -> None:
    if name != "gsm8k":
        pytest.importorskip("math_verify", reason="needs the extra math")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in HUB[name]))
    argv, names = eval_sets.from_command_line([f"eval.sets=[{name}]"])
    composed = OmegaConf.structured(Config)
    composed.model.path, composed.data.source = "model", "arithmetic"
    eval_sets.fill(composed, names)
    cfg = OmegaConf.to_object(composed)
    assert isinstance(cfg, Config) and argv == [f"++eval.sets={{{name}: {{}}}}"]
    of = cfg.eval.sets[name]
    of.data.path, of.data.subset = str(file), None
    (found,) = named_sets(cfg, make_tokenizer())
    asked = "question" if name == "gsm8k" else "problem"
    for prompt, row in zip(found.prompts, HUB[name], strict=True):
        assert isinstance(prompt.content, str) and prompt.content.startswith(f"{row[asked]}\n\nThink step by step")
    (judge,) = of.functions.values()
    columns = {key: [prompt.columns[key] for prompt in found.prompts] for key in found.prompts[0].columns}
    score = resolve(judge.function)
    assert score(RIGHT[name], **columns) == [1.0, 1.0]
    assert score(["\\boxed{9} 9", "none"], **columns) == [0.0, 0.0]
