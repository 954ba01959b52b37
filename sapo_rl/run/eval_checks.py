"""Rules on evaluations."""

from __future__ import annotations

import re

from sapo_rl.config import ENVIRONMENT, Config
from sapo_rl.config.evaluation import EvalSetConfig
from sapo_rl.data import check_source
from sapo_rl.errors import did_you_mean
from sapo_rl.run.config_error import ConfigError, under

RESERVED = ("default", "rewards", "environment")
"""Names that stand for something else beside those of sets."""


def check_evaluation(config: Config) -> None:
    """Refuse evaluations that cannot be made. Raises ConfigError."""
    from sapo_rl.evaluation.sets import judges_of, jury, key_of, settings_of

    for name, settings in settings_of(config).items():
        key = key_of(name)
        if not settings.greedy and not settings.samples:
            raise ConfigError(f"{key}.samples", f"is 0, with {key}.greedy=false: nothing is measured; set one of them")
        known = judges_of(config, jury(config, name))
        judge = settings.reward
        if judge is not None and judge.partition("/")[0] not in known:
            raise ConfigError(f"{key}.reward", f"unknown reward '{judge}'; {did_you_mean(judge, known)}")
    for name, one in config.eval.sets.items():
        _check_set(config, name, one)
    _check_best(config)


def _check_best(config: Config) -> None:
    from sapo_rl.evaluation.sets import goals, jury, prefix_of, settings_of

    metric, known = config.checkpoint.keep_best, goals(config)
    if metric is None or metric in known:
        return
    if not known:
        raise ConfigError("checkpoint.keep_best", f"is {metric}, and nothing is evaluated: eval.prompts is 0")
    functions = [
        (prefix_of(name), one)
        for name in settings_of(config)
        for one in [*jury(config, name).functions.values(), *([ENVIRONMENT] if ENVIRONMENT in config.rewards else [])]
    ]
    if not metric.startswith(tuple(f"{prefix}rewards/{one}/" for prefix, one in functions)):  # what it returns beside
        raise ConfigError("checkpoint.keep_best", f"unknown metric '{metric}'; {did_you_mean(metric, known)}")


def _check_set(config: Config, name: str, one: EvalSetConfig) -> None:
    from sapo_rl.evaluation.sets import key_of, reading_set
    from sapo_rl.rewards import check_function

    key = key_of(name)
    if not re.fullmatch(r"[\w-]+(/[\w-]+)?", name) or name in RESERVED:
        why = "is taken" if name in RESERVED else "is no name"
        raise ConfigError(key, f"'{name}' {why}; valid for a set: letters, digits, _ and -, but {', '.join(RESERVED)}")
    with under(f"{key}.data"), reading_set(name):
        check_source(one.data.beside(config.data))
    for own, function in one.functions.items():
        with under(f"{key}.functions.{own}.function"):
            check_function(f"{key}.functions.{own}", function)
