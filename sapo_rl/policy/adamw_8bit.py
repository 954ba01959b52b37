"""AdamW with moments of eight bits, which is torchao's; imported only where `trainer.optimizer` asks for it."""

from __future__ import annotations

import contextlib
from typing import Any

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import torch
from torch import Tensor, nn
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

from sapo_rl.policy.parallel import Parallel, parameter_groups

SIGNED = {"exp_avg": True, "exp_avg_sq": False}
"""The moments, and whether they may be below zero."""


class EightBit(Parallel):
    """A copy of the policy on every rank, and an optimiser that keeps its moments in blocks of 256 numbers.

    A block has a float32 scale and eight bits for each number. Weights of fewer than 4,096 numbers, and those that are
    not made of whole blocks, have moments in float32.
    """

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self._config
        return _AdamW8bit(
            parameter_groups(self.policy, config),
            lr=config.learning_rate,
            betas=(config.betas[0], config.betas[1]),
            eps=config.adam_eps,
        )

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """See `Parallel.state_of`. Of a moment in eight bits these are the codes and the scales of the blocks."""
        kept = self.optimizer.state.get(parameter, {})
        parts = [part for name, value in kept.items() for part in _parts(name, value)]
        return {"weight": parameter.detach()} | dict(parts)

    @torch.no_grad()
    def restore(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """See `Parallel.restore`."""
        parameter.copy_(state["weight"])
        if "step" not in state:
            return
        own = self.optimizer.state[parameter] = {"step": state["step"].clone()}
        for name, signed in SIGNED.items():
            own[name] = self.optimizer._new_buffer(parameter, signed)  # type: ignore[attr-defined]
            for part, tensor in _parts(name, own[name]):
                tensor.copy_(state[part])


class _AdamW8bit(AdamW8bit):
    """As torchao has it: compiled, one graph for each shape. On the CPU, where that takes minutes, it is not."""

    def step(self, closure: Any = None) -> Any:
        """Step."""
        on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        with torch.compiler.set_stance("force_eager") if on_cpu else contextlib.nullcontext():
            return super().step(closure)


def _parts(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """What a checkpoint keeps of a state: plain tensors by name."""
    if not isinstance(value, OptimState8bit):
        return [(name, value)]
    return [(f"{name}.codes", value.codes), (f"{name}.scale", value.scale)]
