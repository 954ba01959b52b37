"""What a run is called in trackers."""

from __future__ import annotations

import pytest

from sapo_rl.run.names import LONGEST, run_name, shortest


@pytest.mark.parametrize(
    ("key", "short"),
    [
        ("loss.tau_neg", "tau_neg"),
        ("seed", "seed"),
        ("trainer.learning_rate", "learning_rate"),
        ("eval.every", "eval.every"),  # there is checkpoint.every
        ("loss.name", "loss.name"),
        ("loss.kl.coef", "coef"),
        ("reward.functions.mine.args.most", "reward.functions.mine.args.most"),
        ("loss", "loss"),  # a choice: loss=grpo
    ],
)
def test_a_key_is_told_by_its_end_where_no_other_ends_so(key: str, short: str) -> None:
    assert shortest(key) == short


def test_a_name_says_what_was_set_beside_the_recipe_and_where_the_run_lies() -> None:
    typed = ["config=mine.yaml", "loss=grpo", "+seed=3", "logging.wandb=off", "launch=ddp", "launch.num_processes=2"]
    typed += ["run_dir=out", "checkpoint.every=5", "hydra/launcher=joblib", "-m", "dry_run=false"]
    assert run_name("mine", typed, "2026-11-23_04-09-45") == "mine loss=grpo seed=3 2026-11-23_04-09-45"
    assert run_name("mine", ["config=mine.yaml"], "first") == "mine first"


def test_a_name_holds_no_secret_and_is_no_longer_than_trackers_take() -> None:
    secret = "+reward.functions.judge.args.api_key=abc123"
    assert run_name("mine", [secret], "a") == "mine reward.functions.judge.args.api_key=<redacted> a"
    long = run_name("mine", [f"data.shuffle={'x' * 500}"], "a")
    assert len(long) == len("mine  a") + LONGEST and long.startswith("mine shuffle=xxx") and long.endswith("x… a")
