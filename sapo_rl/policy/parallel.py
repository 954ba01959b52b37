"""The policy over several ranks, as Accelerate's environment asks: copies (DDP), or sharded (FSDP2, DeepSpeed ZeRO).

Whatever the way, the weights that the optimiser steps are float32, and a layer computes in the policy's dtype.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import swap_tensors

from sapo_rl.config import ADAMW_8BIT, TrainerConfig
from sapo_rl.errors import UserError
from sapo_rl.policy.model import Policy, reshard, whole
from sapo_rl.policy.working import WorkingCopy
from sapo_rl.sizing import is_kept

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight, beside the number of its steps."""


def parallel(policy: Policy, config: TrainerConfig, accelerator: Accelerator, fused: bool) -> Parallel:
    """Spread the policy over the ranks as the launcher asks, and make its optimiser.

    Raises:
        UserError: the launcher asks for what is not there.
    """
    kind: type[Parallel] = Parallel
    sharding = torch.distributed.is_initialized() and (_asked_for("DEEPSPEED") or _asked_for("FSDP"))
    if config.optimizer == ADAMW_8BIT:
        if sharding:
            raise UserError(f"trainer.optimizer: {ADAMW_8BIT} is not for sharded weights; set adamw, or launch=ddp")
        from sapo_rl.policy.adamw_8bit import EightBit

        kind = EightBit
    elif sharding and _asked_for("DEEPSPEED"):
        from sapo_rl.policy.zero import ZeroParallel

        kind = ZeroParallel
    elif sharding:
        kind = FullySharded
    return kind(policy, config, accelerator, fused)


class Parallel:
    """A copy of the policy on every rank, whose gradients are averaged (DDP), or the only one."""

    def __init__(self, policy: Policy, config: TrainerConfig, accelerator: Accelerator, fused: bool) -> None:
        """Spread the policy and make its optimiser; `module` is what to call in its place."""
        self.policy = policy
        self._config = config
        self._accelerator = accelerator
        self._fused = fused
        self._copy: WorkingCopy | None = None
        self.module, self.optimizer = self._spread()

    def _spread(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        policy = self.reference(self.policy)
        if policy.dtype == torch.bfloat16:
            self._copy = WorkingCopy(policy)
        return self._accelerator.prepare(policy), self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return adamw(self.policy, self._config, self._fused)

    def reference(self, policy: Policy) -> Policy:
        """Bring a frozen policy to the device, or to the devices."""
        take_from_rank_0([*policy.parameters(), *policy.buffers()], self._accelerator.device)
        return policy

    def passes(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of passes between which no weight changes: what they have in common is done once."""
        return contextlib.nullcontext() if self._copy is None else self._copy.in_use()

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward and backward pass; the ranks' gradients meet in the `last` of an update.

        It lies in one of `passes`.
        """
        if self._copy is not None:
            self._copy.differentiate()
        return contextlib.nullcontext() if last else self._accelerator.no_sync(self.module)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a (0-d) loss, which the optimiser's step takes the sum of over the ranks."""
        (loss * self._accelerator.num_processes).backward()  # the gradients are averaged

    def step(self) -> Tensor:
        """Clip the gradients, step the optimiser, and return the norm before clipping, 0-d."""
        gradients = [parameter.grad for parameter in self.policy.parameters() if parameter.grad is not None]
        norm = self._norm(gradients)
        scale = (self._config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([_own(g) for g in gradients], scale.float())  # pyright: ignore[reportPrivateImportUsage]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return squares(gradients).sqrt()

    def shape_of(self, parameter: nn.Parameter) -> torch.Size:
        """Return the shape of the whole weight."""
        return parameter.shape

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the `weight` and what the optimiser keeps for it, whole; every rank must ask for the same one."""
        kept = self.optimizer.state.get(parameter, {})
        return {"weight": whole(parameter)} | {name: whole(value) for name, value in kept.items()}

    @torch.no_grad()
    def restore(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Undo `state_of`, on as many ranks as there are now."""
        parameter.copy_(_placed_as(parameter, state["weight"]))
        if "step" in state:
            self.optimizer.state[parameter] = {
                "step": state["step"].to(parameter.device if self._fused else "cpu", copy=True),
                **{name: _placed_as(parameter, state[name]) for name in MOMENTS},
            }


class FullySharded(Parallel):
    """FSDP2: each rank holds its share of weights, gradients and optimiser state; layers are gathered as they compute.

    A model that is small beside the GPU's memory is gathered once an update, and its gradients are reduced once: it
    keeps its layers and whole gradients from one micro-batch to the next. So does any model by a launch profile with
    `fsdp_reshard_after_forward: false`. A large one is gathered for each pass, and reduces after each.
    Vectors (norms, biases) stay whole on every rank: they are small, and norms multiply with them in float32.
    """

    def _spread(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        plugin = FullyShardedDataParallelPlugin()  # reads the launcher's environment
        if plugin.fsdp_version != 2:
            raise UserError("the launch profile asks for FSDP version 1; set fsdp_version: 2")
        if _is_true("FSDP_OFFLOAD_PARAMS"):
            raise UserError("the launch profile asks for fsdp_offload_params, which is not supported")
        keeps = not plugin.reshard_after_forward or _is_small(self.policy, self._accelerator.device)
        self._keeps = all(gather_object([keeps]))  # GPUs may differ, but ranks must meet at the same places
        sharded: Any = self._shard(self.policy, self._keeps)
        sharded.set_reshard_after_backward(not self._keeps)
        return sharded, self._make_optimizer()

    def reference(self, policy: Policy) -> Policy:
        """Shard a policy in place."""
        return self._shard(policy, keep=False)

    def _shard(self, policy: Policy, keep: bool) -> Policy:
        ranks, device = self._accelerator.num_processes, self._accelerator.device
        vectors = [parameter for parameter in policy.parameters() if parameter.dim() < 2]
        take_from_rank_0([*vectors, *policy.buffers()], device)
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (ranks,)),
            # Layers pass on the compute dtype by themselves; positions and temperatures must stay as they are.
            "mp_policy": MixedPrecisionPolicy(policy.dtype, torch.float32, cast_forward_inputs=False),
            "ignored_params": set(vectors),
        }
        for layer in policy.layers():  # one is whole on the device at a time
            take_from_rank_0(_matrices(layer), device)
            fully_shard(layer, reshard_after_forward=not keep, **options)
        # The rest is gathered when the policy is called: it uses embedding and head outside their own modules.
        take_from_rank_0(_matrices(policy), device)
        fully_shard(policy, **options)
        return policy

    @contextlib.contextmanager
    def passes(self) -> Iterator[None]:
        """See `Parallel.passes`; in the end the layers that were kept are given up."""
        try:
            yield
        finally:
            if self._keeps:
                reshard(self.policy)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """See `Parallel.micro_batch`."""
        if self._keeps:
            self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        return contextlib.nullcontext()

    def step(self) -> Tensor:
        """See `Parallel.step`."""
        parameters = self.policy.parameters()
        vectors = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
        if vectors:
            joined = torch.cat([vector.flatten() for vector in vectors])
            torch.distributed.all_reduce(joined)
            joined /= self._accelerator.num_processes
            for vector, mean in zip(vectors, joined.split([vector.numel() for vector in vectors]), strict=True):
                vector.copy_(mean.view_as(vector))
        return super().step()

    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        total = squares([gradient for gradient in gradients if isinstance(gradient, DTensor)])
        torch.distributed.all_reduce(total)
        return (total + squares([gradient for gradient in gradients if not isinstance(gradient, DTensor)])).sqrt()


def loads_weights(accelerator: Accelerator) -> bool:
    """Return whether this rank reads the model's weights; else it gets them from rank 0, see `load_policy`'s `empty`.

    One copy in the memory of one host is all that it takes. DeepSpeed wants them everywhere.
    """
    return accelerator.is_main_process or _asked_for("DEEPSPEED")


@torch.no_grad()
def take_from_rank_0(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Bring rank 0's parameters and buffers to every rank's device, in place, also where they are on `meta`."""
    # A model that was not loaded may not know which of its weights its checkpoint keeps in another dtype.
    (dtypes,) = broadcast_object_list([[tensor.dtype for tensor in tensors]])
    for tensor, dtype in zip(tensors, dtypes, strict=True):
        own = torch.empty_like(tensor, dtype=dtype, device=device) if tensor.is_meta else tensor.data.to(device, dtype)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(own, 0)
        if tensor.is_meta:  # all modules that share it see the change
            swap_tensors(tensor, nn.Parameter(own, requires_grad=tensor.requires_grad))
        else:
            tensor.data = own


def _is_small(policy: Policy, device: torch.device) -> bool:
    """Return whether gathered weights (2 bytes each in bfloat16) and whole gradients (4) take little of the GPU."""
    if device.type != "cuda":
        return False
    count = sum(weight.numel() for weight in policy.parameters())
    return is_kept(count, policy.dtype.itemsize, torch.cuda.get_device_properties(device).total_memory)


def _matrices(module: nn.Module) -> list[Tensor]:
    """The parameters that are to be sharded and are not yet."""
    return [weight for weight in module.parameters() if weight.dim() >= 2 and not isinstance(weight, DTensor)]


def squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of tensors, or of this rank's shards of them, 0-d float64.

    In float32 a sum over an embedding loses the fifth digit, and another one with every way of sharding.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    # A few kernels for all: a launch for each of hundreds of weights costs a small model more than the sums do.
    norms = torch._foreach_norm([_own(t) for t in tensors], 2, dtype=torch.float64)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(norms).square().sum()


def adamw(policy: Policy, config: TrainerConfig, fused: bool) -> torch.optim.AdamW:
    """Return AdamW over the weights that are trained."""
    return torch.optim.AdamW(
        parameter_groups(policy, config),
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.adam_eps,
        fused=fused,
    )


def parameter_groups(policy: Policy, config: TrainerConfig) -> list[dict[str, Any]]:
    """Return the weights that are trained, as an optimiser takes them; norms and biases are not decayed."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    return [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _own(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _placed_as(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Copy a whole tensor to the parameter's device, or this rank's shard of it where the parameter is one."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return torch.empty_like(parameter).copy_(value)  # a shard of its own: a view would keep the whole in memory


def _asked_for(way: str) -> bool:
    return _is_true(f"ACCELERATE_USE_{way}")


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")
