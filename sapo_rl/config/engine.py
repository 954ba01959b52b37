"""Settings of the engine that writes completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sapo_rl.config.fields import choice

VLLM = "vllm"


@dataclass
class EngineConfig:
    """What writes completions beside the trainer.

    Example:
        rollout.engine.name=my_engine.PlainEngine rollout.engine.args={threads: 4}
    """

    name: str = choice(VLLM, VLLM, own="engine")
    """`vllm`, or the dotted path of an engine class of your own: docs/extending.md."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of an engine class of your own, after its settings."""
