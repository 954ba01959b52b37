"""The config as OmegaConf reads it."""

from __future__ import annotations

import functools

from omegaconf import DictConfig, OmegaConf

from sapo_rl.config import Config


@functools.cache
def schema() -> DictConfig:
    """Return every key with its type and default: made once, which takes as long as to compose a config. Only copy it.

    Example:
        >>> schema().loss.name
        'sapo'
    """
    return OmegaConf.structured(Config)
