"""Settings of the policy: the model, and adapters that are trained in its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from sapo_rl.config.fields import MISSING, choice, number

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""For which vLLM makes room where it keeps adapters."""


def vllm_rank(rank: int) -> int:
    """Return the rank, up to 512, for which vLLM makes room so that adapters of this one fit."""
    return next((one for one in VLLM_RANKS if one >= rank), VLLM_RANKS[-1])


@dataclass
class LoraConfig:
    """Adapters that are trained in place of the model's own weights; docs/lora.md.

    Example:
        >>> LoraConfig(rank=32, alpha=64).rank
        32
    """

    rank: int = number(0, least=0)
    """Rank of the adapters; 0 trains the whole model. With adapters take about ten times the learning rate."""
    alpha: float = number(32.0, above=0)
    """What an adapter adds is multiplied by alpha / rank."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Linear modules that get an adapter, e.g. `[q_proj, v_proj]`; `all-linear` stands for all but the head."""
    sync: str = choice("merged", "merged", "adapter")
    """What vLLM gets after each step: the adapted weights with their adapters merged in (`merged`), or the adapters
    alone (`adapter`), which are far smaller and not rounded away, but make decoding slower."""

    @property
    def alone(self) -> bool:
        """Whether adapters reach vLLM apart from the weights that they adapt."""
        return self.rank > 0 and self.sync == "adapter"


@dataclass
class ModelConfig:
    """The policy: which model, and in which precision it computes.

    Example:
        >>> ModelConfig(path="Qwen/Qwen2.5-0.5B-Instruct").dtype
        'bfloat16'
    """

    path: str = MISSING
    """A Hugging Face model folder, or a name on the hub; `smollm2-135m` is made at its first use, out of a package."""
    revision: Optional[str] = None
    """Branch, tag or commit, where `path` is a name on the hub."""
    dtype: str = choice("bfloat16", "bfloat16", "float32")
    """Precision of forward and backward passes and of vLLM. The weights that are trained are always float32."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave off unless you have read that code."""
    lora: LoraConfig = field(default_factory=LoraConfig)
