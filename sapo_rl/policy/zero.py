"""DeepSpeed's ZeRO under the policy; imported only where the launcher asks for it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import Any

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import deepspeed
import torch
from accelerate.utils import DeepSpeedPlugin
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from sapo_rl.errors import UserError
from sapo_rl.policy.packing import empty_batch
from sapo_rl.policy.parallel import MOMENTS, Parallel


class ZeroParallel(Parallel):
    """DeepSpeed's engine: it reduces, clips and steps, and shards gradients, optimiser and (stage 3) weights.

    Its own mixed precision stays off: weights are float32, and the policy computes under autocast as elsewhere.
    """

    def _spread(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of names that it uses
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        config = _launched_config()
        self._shards_weights: bool = config["zero_optimization"]["stage"] == 3
        config |= {
            "train_batch_size": self._accelerator.num_processes,  # nominal: the trainer normalises the loss
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self._config.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
        }
        optimizer = self._make_optimizer()
        self._engine, *_ = deepspeed.initialize(model=self.policy, optimizer=optimizer, config=config)
        for flat in (flat for group in optimizer.param_groups for flat in group["params"]):
            # The engine links weights and moments once, when the first of the groups has been stepped.
            optimizer.state[flat] = {name: torch.zeros_like(flat) for name in MOMENTS}
            optimizer.state[flat]["step"] = torch.zeros((), device=flat.device if self._fused else "cpu")
        self._has_moments = False
        if self._shards_weights:
            self.policy.gather = _gather
        return self._engine, optimizer

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Tell the engine whether the optimiser steps after this one."""
        self._engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Parallel.backward`."""
        self._engine.backward(loss * self._accelerator.num_processes)

    def step(self) -> Tensor:
        """See `Parallel.step`."""
        self._engine.step()
        self._has_moments = True
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self._accelerator.device)
        return norm.masked_fill(norm < 0, torch.nan)  # the engine writes -1 for one that is not finite

    def shape_of(self, parameter: nn.Parameter) -> torch.Size:
        """See `Parallel.shape_of`."""
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """See `Parallel.state_of`."""
        state = {"weight": safe_get_full_fp32_param(parameter)}
        if self._has_moments:
            state |= {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            state["step"] = next(iter(self.optimizer.state.values()))["step"]
        return state

    @torch.no_grad()
    def restore(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """See `Parallel.restore`."""
        if "step" in state:
            self._make_moments()
            for flat in self.optimizer.state.values():
                flat["step"].fill_(state["step"])
        whole = {name: value.to(self._accelerator.device) for name, value in state.items() if name != "step"}
        if self._shards_weights:
            self._restore_shards(parameter, whole)
            return
        parameter.copy_(whole["weight"])
        safe_set_full_fp32_param(parameter, whole.pop("weight"))
        for name, value in whole.items():
            safe_set_full_optimizer_state(parameter, value, name)

    def _restore_shards(self, parameter: nn.Parameter, whole: dict[str, Tensor]) -> None:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(whole["weight"])
        size = parameter.ds_tensor.numel()  # equal on all ranks: the last one is padded
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        for name, value in whole.items():
            padded = nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))
            own = padded[rank * size : (rank + 1) * size]
            if name == "weight":
                safe_set_local_fp32_param(parameter, own)
            else:
                safe_set_local_optimizer_state(parameter, own, name)

    @torch.enable_grad()
    def _make_moments(self) -> None:
        """Have the engine make the optimiser's state, which it does in the first step; one without a gradient."""
        if self._has_moments:
            return
        with self.micro_batch(last=True):
            logps, _ = self.module(empty_batch().to(self._accelerator.device), 1.0)
            self.backward(logps.sum() * 0.0)
        self.step()


def _launched_config() -> dict[str, Any]:
    plugin = DeepSpeedPlugin()  # reads the launcher's environment
    config: dict[str, Any] = plugin.deepspeed_config
    if config["zero_optimization"]["stage"] not in (2, 3):
        raise UserError(f"the launch profile asks for zero_stage {plugin.zero_stage}; 2 and 3 are supported")
    if plugin.hf_ds_config.is_offload():
        raise UserError("the launch profile asks DeepSpeed to offload to the host, which is not supported")
    if "optimizer" in config or "scheduler" in config:
        raise UserError("the DeepSpeed config names an optimizer or a scheduler; set trainer.* instead")
    return config


def _gather(weight: Tensor, _: torch.dtype) -> Tensor:
    with deepspeed.zero.GatheredParameters([weight] if hasattr(weight, "ds_id") else []):
        return weight.detach().clone()
