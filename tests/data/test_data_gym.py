"""Prompts from reasoning-gym."""

from __future__ import annotations

from typing import Any

import pytest
from optional import needs

from sapo_rl.data.gym import create, generate
from sapo_rl.errors import UserError

pytestmark = needs("reasoning_gym")


def test_rows_are_the_datasets_entries() -> None:
    import reasoning_gym

    rows = generate("leg_counting", {"max_animals": 4}, 5, seed=7)
    entries = list(reasoning_gym.create_dataset("leg_counting", max_animals=4, seed=7, size=5))
    assert [(row["question"], row["answer"], row["metadata"]) for row in rows] == [
        (entry["question"], entry["answer"], entry["metadata"]) for entry in entries
    ]
    assert all(row["prompt"] == row["question"] for row in rows)


def test_repeated_questions_are_left_out() -> None:
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    rows = generate("chain_sum", tiny, 400, seed=0)
    assert len({row["prompt"] for row in rows}) == len(rows) < 400


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("chain_sums", {}, "no dataset 'chain_sums'; did you mean 'chain_sum'"),
        ("chain_sum", {"max_term": 3}, "takes no 'max_term'; did you mean 'max_terms'"),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, "'chain_sum' of reasoning-gym refuses"),
        ("chain_sum", {"min_terms": "two"}, "'chain_sum' of reasoning-gym refuses"),
        ("chain_sum", {"size": 3}, r"set by data\.size"),
        ("chain_sum", {"seed": 3}, r"set by seed"),
        ("composite", {}, "Must specify at least one dataset"),
    ],
)
def test_bad_names_and_arguments_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create(name, args, size=1, seed=0)
