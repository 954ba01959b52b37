"""reasoning-gym's own scorers, on prompts as the data side makes them."""

from __future__ import annotations

import json
import pickle

import pytest
from optional import needs

from sapo_rl.data.gym import generate
from sapo_rl.rewards import reasoning_gym

pytestmark = needs("reasoning_gym")


def score(reply: str, row: dict) -> float | None:
    row = pickle.loads(pickle.dumps(row))  # as it reaches a worker
    return reasoning_gym(
        completions=[reply],
        prompts=[row["prompt"]],
        **{name: [value] for name, value in row.items() if name != "prompt"},
    )[0]


@pytest.mark.parametrize("name", ["chain_sum", "arc_agi", "countdown", "leg_counting", "n_queens", "time_intervals"])
def test_the_datasets_own_answer_scores_1_however_it_is_wrapped(name: str) -> None:
    for row in generate(name, {}, 3, seed=5):
        json.dumps(row)
        assert score(row["answer"], row) == 1.0
        assert score(f"<think>0</think>So: <answer>{row['answer']}</answer>", row) == 1.0
        assert score("", row) < 1.0


def test_a_wrong_answer_scores_0() -> None:
    row = generate("chain_sum", {"min_terms": 2, "max_terms": 2}, 1, seed=1)[0]
    assert score("\\boxed{%s}" % row["answer"], row) == 1.0  # noqa: UP031
    assert score(str(int(row["answer"]) + 1), row) == 0.0


def test_the_scorer_knows_the_datasets_arguments() -> None:
    args = {"min_num_decimal_places": 1, "max_num_decimal_places": 1, "precision": 3}
    row = generate("decimal_arithmetic", args, 1, seed=1)[0]
    close = f"{float(row['answer']) + 0.02:.2f}"
    loose, strict = {**row}, {**row, "gym": {"dataset": "decimal_arithmetic", "args": {}}}
    assert score(close, loose) != score(close, strict)


def test_a_reply_on_which_the_scorer_stumbles_scores_0() -> None:
    row = generate("prime_factorization", {}, 1, seed=1)[0]
    assert score("(1, 2)", row) == 0.0


def test_composite_scores_by_the_dataset_the_prompt_came_from() -> None:
    parts = [{"name": name, "weight": 1, "config": {}} for name in ("chain_sum", "leg_counting")]
    rows = generate("composite", {"datasets": parts}, 12, seed=3)
    assert {row["metadata"]["source_dataset"] for row in rows} == {"chain_sum", "leg_counting"}
    assert [score(row["answer"], row) for row in rows] == [1.0] * 12
