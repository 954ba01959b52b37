"""Reward functions: the built-in verifiers, how names become functions, and the pool that runs them.

Importing this package loads none of the libraries that the verifiers use.
"""

from __future__ import annotations

from sapo_rl.rewards.code import code, isolation_warning
from sapo_rl.rewards.gym import reasoning_gym
from sapo_rl.rewards.judge import judge
from sapo_rl.rewards.lookup import check_function, resolve
from sapo_rl.rewards.math import math_verify
from sapo_rl.rewards.model import reward_model
from sapo_rl.rewards.registry import REWARD_FUNCTIONS, RewardFunction
from sapo_rl.rewards.runner.batch import Scoring
from sapo_rl.rewards.runner.pool import RewardPool
from sapo_rl.rewards.short_answers import squad_exact_match, squad_f1
from sapo_rl.rewards.text import exact_match, format_tags, length_limit, numeric_answer, numeric_digits, regex

__all__ = [
    "REWARD_FUNCTIONS",
    "RewardFunction",
    "RewardPool",
    "Scoring",
    "check_function",
    "code",
    "exact_match",
    "format_tags",
    "isolation_warning",
    "judge",
    "length_limit",
    "math_verify",
    "numeric_answer",
    "numeric_digits",
    "reasoning_gym",
    "regex",
    "resolve",
    "reward_model",
    "squad_exact_match",
    "squad_f1",
]
