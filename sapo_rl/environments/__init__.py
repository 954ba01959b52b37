"""What a model talks to over several turns: its tools, its games, and the tokens of what is said.

Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from sapo_rl.environments.adapters.openenv import OpenEnv
from sapo_rl.environments.adapters.textarena import TextArena
from sapo_rl.environments.adapters.verifiers import NAME as VERIFIERS
from sapo_rl.environments.adapters.verifiers import Verifiers
from sapo_rl.environments.calculator import Calculator
from sapo_rl.environments.endpoint import AGENT, Endpoint
from sapo_rl.environments.guess import Guess
from sapo_rl.environments.lookup import check_environment, check_tool, environment_for
from sapo_rl.environments.python import Python
from sapo_rl.environments.registry import ENVIRONMENTS
from sapo_rl.environments.search import Search
from sapo_rl.environments.wordle import Wordle

AGENTS = (AGENT, VERIFIERS)
"""Environments that ask the model by themselves, and have tools of their own."""

__all__ = [
    "AGENTS",
    "ENVIRONMENTS",
    "Calculator",
    "Endpoint",
    "Guess",
    "OpenEnv",
    "Python",
    "Search",
    "TextArena",
    "Verifiers",
    "Wordle",
    "check_environment",
    "check_tool",
    "environment_for",
]
