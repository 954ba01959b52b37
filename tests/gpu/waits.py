"""What the GPU tests of whole and of adapted models share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sapo_rl.policy.trainer import PolicyTrainer
from sapo_rl.types import Group


def update_without_waiting(trainer: PolicyTrainer, groups: Sequence[Group]) -> int:
    """Take an update while every wait of the host for the device raises; return the number of its micro-batches."""
    items, _ = trainer._share(groups)
    part = trainer._micro_batches(items)
    trainer._remember_logps([part])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._update(part, [])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return len(part)
