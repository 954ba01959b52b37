"""A model as it lies in a folder or a checkpoint, without a trainer around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sapo_rl.config import ModelConfig
from sapo_rl.policy import checkpoint
from sapo_rl.policy.model import Policy, load_policy


def trainable_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Return the shapes of the weights that a checkpoint of the model holds, by name; reads no weights.

    Raises:
        UserError: as `load_policy` does.
    """
    return {name: weight.shape for name, weight in _policy(config, empty=True).trainable_weights()}


def _policy(config: ModelConfig, empty: bool) -> Policy:
    """The model, with adapters where the config asks for them."""
    policy = load_policy(config, empty=empty)
    if not config.lora.rank:
        return policy
    from sapo_rl.policy.lora import LoraPolicy  # peft takes a second to import

    return LoraPolicy(policy, config.lora, 0, config.path)


@torch.no_grad()
def saved_policy(config: ModelConfig, folder: Path | None) -> Policy:
    """Return the model, with what the checkpoint in `folder` has of it, on the CPU.

    Raises:
        UserError: it cannot be loaded, or the checkpoint is of another model.
    """
    policy = _policy(config, empty=False)
    if folder is not None:
        weights = dict(checkpoint.read_weights(folder))
        for name, parameter in policy.trainable_weights():
            parameter.copy_(weights[name])
    return policy


def saved_weights(config: ModelConfig, folder: Path | None) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights under their Hugging Face names, float32 or in the compute dtype; adapters are merged in.

    Those of a checkpoint without adapters are read one by one. The arguments and errors are those of `saved_policy`.
    """
    if folder is not None and not config.lora.rank:
        yield from checkpoint.read_weights(folder)
        return
    policy = saved_policy(config, folder)
    if not config.lora.rank:
        yield from policy.named_weights()
        return
    buffers = {name for name, _ in policy.model.named_buffers()}
    merged = dict(policy.state())  # what has adapters comes twice, the second time with them
    yield from ((name, tensor) for name, tensor in merged.items() if name not in buffers)
