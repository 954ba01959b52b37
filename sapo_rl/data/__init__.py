"""Prompts: where rows come from, how they become token sequences, and in which order they are drawn.

Importing this package loads neither torch nor datasets.
"""

from __future__ import annotations

from sapo_rl.data.prompts import build_prompts
from sapo_rl.data.sampler import PromptSampler, repetition_warning
from sapo_rl.data.sources import check_source, load_rows, load_set

__all__ = ["PromptSampler", "build_prompts", "check_source", "load_rows", "load_set", "repetition_warning"]
