"""Reinforcement-learning fine-tuning of language models under the SAPO objective.

From Python: `from sapo_rl import train` (see `sapo_rl.run.api`), with the config's schema as `Config`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sapo_rl.config import Config
    from sapo_rl.run.api import Run, train

__all__ = ["Config", "Run", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is: the commands need little of it."""
    if name == "Config":
        from sapo_rl.config import Config

        return Config
    if name in ("Run", "train"):
        from sapo_rl.run import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
