"""Is what the policy is trained with possible? Rules on adapters and on the optimiser."""

from __future__ import annotations

import os

from sapo_rl import plugins
from sapo_rl.config import ADAMW_8BIT, Config
from sapo_rl.config.engine import VLLM
from sapo_rl.config.model import VLLM_RANKS
from sapo_rl.run import launch
from sapo_rl.run.config_error import ConfigError


def check_lora(config: Config) -> None:
    """Refuse adapters of nothing, and a vLLM that would discard what is under them.

    Raises:
        ConfigError: naming the key.
    """
    lora = config.model.lora
    if lora.rank and not lora.target_modules:
        raise ConfigError("model.lora.target_modules", "is empty; name linear modules, or all-linear for all of them")
    if lora.rank and config.rollout.sleep == "2":
        raise ConfigError(
            "rollout.sleep", "2 discards weights that are not sent again with model.lora.rank above 0; set auto, 0 or 1"
        )


def check_lora_sync(config: Config) -> None:
    """Refuse adapters that are to reach vLLM alone, where it cannot take them.

    Raises:
        ConfigError: naming the key.
    """
    rollout, rank = config.rollout, config.model.lora.rank
    if config.model.lora.sync != "adapter":
        return
    if not rank:
        raise ConfigError("model.lora.sync", "'adapter' needs model.lora.rank above 0; set that, or merged")
    if rank > VLLM_RANKS[-1]:
        raise ConfigError("model.lora.rank", f"is {rank}; model.lora.sync=adapter goes up to {VLLM_RANKS[-1]}")
    if rollout.servers:
        raise ConfigError("model.lora.sync", "'adapter' does not reach rollout.servers; set merged")
    if rollout.engine.name != VLLM:
        raise ConfigError("model.lora.sync", f"'adapter' is for vLLM; '{rollout.engine.name}' gets weights: set merged")


def check_optimizer(config: Config) -> None:
    """Refuse an optimiser that is not installed, or does not go with the launch profile.

    Raises:
        ConfigError: naming the key.
    """
    if config.trainer.optimizer != ADAMW_8BIT:
        return
    if plugins.find_spec("torchao") is None:
        raise ConfigError("trainer.optimizer", f"{ADAMW_8BIT} needs torchao: pip install 'sapo-train[torchao]'")
    if "RANK" not in os.environ and launch.shards(config.launch.profile):  # else the processes are there already
        raise ConfigError(
            "trainer.optimizer",
            f"{ADAMW_8BIT} is not for sharded weights (launch.profile={config.launch.profile}); set adamw",
        )
