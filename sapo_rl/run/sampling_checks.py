"""Rules on what is sampled, and on the checks that measure it."""

from __future__ import annotations

from sapo_rl.config import Config
from sapo_rl.config.reward import BATCH
from sapo_rl.data.tables import check_file
from sapo_rl.errors import did_you_mean
from sapo_rl.run.config_error import ConfigError, under

COMPLETIONS = "data.check.completions"
"""The key of the file that `check=rewards` reads."""


def check_sampling(config: Config) -> None:
    """Refuse what cannot be known when prompts or groups are chosen. Raises ConfigError."""
    rates, refill = config.data.pass_rate, config.rollout.refill
    reward = rates.reward
    if reward is not None and reward.partition("/")[0] not in config.rewards:
        raise ConfigError("data.pass_rate.reward", f"unknown reward '{reward}'; {did_you_mean(reward, config.rewards)}")
    if rates.low is not None and rates.high is not None and rates.low >= rates.high:
        raise ConfigError("data.pass_rate.low", f"is {rates.low}; must be below data.pass_rate.high = {rates.high}")
    if rates.path is not None and not (config.resume or config.fork):  # which have them in their checkpoint
        from sapo_rl.data.pass_rates import located  # imports numpy

        with under("data.pass_rate.path"):
            check_file("data.pass_rate.path", located(rates.path))
    for name, function in config.reward.functions.items():
        if refill.max_extra and function.scope == BATCH:
            raise ConfigError(
                "rollout.refill.max_extra",
                f"is {refill.max_extra:g}: whether a group is replaced must be known before the batch is whole, but "
                f"reward.functions.{name}.scope is {BATCH}; set one of them otherwise",
            )


def check_replay(config: Config) -> None:
    """Refuse to train on earlier groups where nothing says how likely their tokens were then. Raises ConfigError."""
    size, loss = config.rollout.replay.size, config.loss
    if size and not config.rollout.logprobs:
        raise ConfigError(
            "rollout.replay.size", f"is {size}: only rollout.logprobs=true keeps how likely tokens were when sampled"
        )
    if size and loss.old_logps != "rollout" and not loss.correction.by_token:
        raise ConfigError(
            "rollout.replay.size",
            f"is {size}: with loss.old_logps={loss.old_logps} and loss.correction.mode={loss.correction.mode} earlier "
            "groups would pass for this step's; set loss.correction.mode=token_truncate, or loss.old_logps=rollout",
        )


def check_checks(config: Config) -> None:
    """Refuse what `check=data` and `check=rewards` cannot do. Raises ConfigError."""
    if config.check == "rewards":
        if not config.reward.functions:
            raise ConfigError("check", "'rewards' needs reward.functions; what an environment pays is known in a run")
        if config.data.check.completions is None:
            raise ConfigError(
                COMPLETIONS,
                "is missing; a .jsonl or .parquet file with the columns of the data and 'completion', or a run's "
                "completions/step_*.parquet",
            )
        with under(COMPLETIONS):
            check_file(COMPLETIONS, config.data.check.completions)
    if config.check == "data" and (config.resume or config.fork):
        raise ConfigError("check", "'data' measures a model, not a run: leave that out, set model.path=RUN/final")
    if config.check == "data" and config.rollout.servers:
        raise ConfigError("rollout.servers", "check=data has engines of its own; set rollout.servers=[]")
