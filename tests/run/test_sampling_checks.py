"""What is refused of the keys that say what is sampled, by the key's name and with what would be valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sapo_rl.config import Config
from sapo_rl.config.schema import schema
from sapo_rl.run.checks import ConfigError, check

BASE = {
    "model": {"path": "some/model"},
    "data": {"source": "arithmetic"},
    "reward": {"functions": {"right": {"function": "numeric_answer"}}},
}


def made(*keys: str) -> Config:
    found: Any = OmegaConf.to_object(
        OmegaConf.merge(schema(), OmegaConf.create(BASE), OmegaConf.from_dotlist(list(keys)))
    )
    return found


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["data.sampling=passrate"], r"data\.sampling: unknown value 'passrate'; did you mean 'pass_rate'"),
        (["data.pass_rate.reward=rihgt"], r"data\.pass_rate\.reward: unknown reward 'rihgt'; did you mean 'right'"),
        (["data.pass_rate.reward=rihgt/x"], r"data\.pass_rate\.reward: unknown reward 'rihgt/x'"),
        (["data.pass_rate.solved_at=.inf"], r"data\.pass_rate\.solved_at: is inf; must be a finite number"),
        (["data.pass_rate.target=1"], r"data\.pass_rate\.target: is 1\.0; must be at most 0\.99"),
        (["data.pass_rate.floor=0"], r"data\.pass_rate\.floor: is 0\.0; must be at least 0\.001"),
        (["data.pass_rate.low=-1"], r"data\.pass_rate\.low: is -1\.0; must be at least 0"),
        (["data.pass_rate.high=2"], r"data\.pass_rate\.high: is 2\.0; must be at most 1"),
        (
            ["data.pass_rate.low=0.5", "data.pass_rate.high=0.5"],
            r"data\.pass_rate\.low: is 0\.5; must be below data\.pass_rate\.high = 0\.5",
        ),
        (["data.pass_rate.min_samples=0"], r"data\.pass_rate\.min_samples: is 0; must be at least 1"),
        (["data.pass_rate.path=gone"], r"data\.pass_rate\.path: 'gone' has an unknown ending; valid: \.jsonl"),
        (["data.pass_rate.path=gone.parquet"], r"data\.pass_rate\.path: there is no file 'gone\.parquet'"),
        (["data.pass_rate.path=/tmp"], r"data\.pass_rate\.path: there is no file '/tmp/pass_rates\.parquet'"),
        (["rollout.replay.size=-1"], r"rollout\.replay\.size: is -1; must be at least 0"),
        (["rollout.replay.size=8", "rollout.replay.max_age=0"], r"rollout\.replay\.max_age: is 0; must be at least 1"),
        (["rollout.replay.size=8"], r"rollout\.replay\.size: is 8: only rollout\.logprobs=true keeps how likely"),
        (
            ["rollout.replay.size=8", "rollout.logprobs=true"],
            r"rollout\.replay\.size: is 8: with loss\.old_logps=recompute and loss\.correction\.mode=none earlier "
            r"groups would pass for this step's; set loss\.correction\.mode=token_truncate, or loss\.old_logps=rollout",
        ),
        (
            ["rollout.replay.size=8", "rollout.logprobs=true", "loss.correction.mode=sequence_mask"],
            r"loss\.correction\.mode=sequence_mask earlier groups would pass for this step's",
        ),
        (["data.check.prompts=0"], r"data\.check\.prompts: is 0; must be at least 1"),
        (["data.check.samples=0"], r"data\.check\.samples: is 0; must be at least 1"),
        (["check=data", "resume=runs/x"], r"check: 'data' measures a model, not a run: .*model\.path=RUN/final"),
        (["check=data", "rollout.servers=[a:1]"], r"rollout\.servers: check=data has engines of its own"),
        (["check=rewards"], r"data\.check\.completions: is missing"),
    ],
)
def test_what_cannot_be_is_told_with_its_key(keys: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(made(*keys))


def test_a_folder_of_pass_rates_and_what_a_resume_has_in_its_checkpoint_are_let_pass(tmp_path: Path) -> None:
    (tmp_path / "pass_rates.parquet").touch()
    check(made(f"data.pass_rate.path={tmp_path}", "data.sampling=pass_rate", "data.pass_rate.reward=right/further"))
    check(made("data.pass_rate.path=gone.parquet", "resume=runs/x"))


@pytest.mark.parametrize("how", ["loss.old_logps=rollout", "loss.correction.mode=token_mask"])
def test_earlier_groups_are_let_pass_where_their_own_log_probabilities_count(how: str) -> None:
    check(made("rollout.replay.size=8", "rollout.logprobs=true", how))
