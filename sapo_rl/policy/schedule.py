"""The learning rate over the updates of a run."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from sapo_rl.config import TrainerConfig


def make_schedule(config: TrainerConfig, optimizer: torch.optim.Optimizer, updates: int, done: int = 0) -> LambdaLR:
    """Return the schedule of the optimiser's learning rate over `updates`, of which some are `done` already.

    The rate is a function of their number alone: that of a resumed run is what it would be had the config been so from
    the start.
    """
    schedule = get_scheduler(
        "constant_with_warmup" if config.schedule == "constant" else config.schedule,
        optimizer,
        num_warmup_steps=config.warmup_updates,
        num_training_steps=updates,
    )
    assert isinstance(schedule, LambdaLR)
    rates = [base * factor(done) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    counted = {"last_epoch": done, "_step_count": done + 1, "_last_lr": rates}
    schedule.load_state_dict(schedule.state_dict() | counted)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return schedule
