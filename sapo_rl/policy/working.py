"""A bfloat16 copy of the float32 weights, made once an update: autocast would cast every weight in every micro-batch.

The float32 weights stay what is optimised, saved and sent, and what gradients add up in; the copy stands in their place
while the model computes. Its gradients come out in bfloat16, as each product's do under autocast, and turn to float32
before anything is added to them, many weights in one kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sapo_rl.policy.model import Policy

GROUP = 1 << 26
"""Elements of weights whose gradients turn to float32 together: few launches for a small model; and for a large one
little that waits in two dtypes, and gradients that meet those of other ranks while the backward pass goes on."""


class WorkingCopy:
    """The copy of all weights that linear layers multiply with, and of the head's.

    Norms stay as they are, because models multiply with them in float32, and the embedding, of which rows are cast.

    Args:
        policy: on its device, computing in bfloat16; not sharded.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        head = policy.model.get_output_embeddings()
        places: dict[nn.Parameter, list[tuple[dict[str, Any], str]]] = {}
        for module in policy.model.modules():
            if isinstance(module, nn.Linear) and module is not head:
                for name, weight in module.named_parameters(recurse=False):
                    if weight.dtype == torch.float32 and weight.requires_grad:
                        places.setdefault(weight, []).append((module._parameters, name))
        self._weights: list[Tensor] = list(places)
        self._places = list(places.values())
        self._copies = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in self._weights]
        self._groups = _groups(self._weights)
        self._head: Tensor = head.weight.detach()  # type: ignore[union-attr]
        self._head_copy: Tensor | None = None
        if self._head.dtype == torch.float32:
            self._head_copy = torch.empty_like(self._head, dtype=torch.bfloat16)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Make the copy anew, and have the model compute with it, without gradients; in the end with its own weights.

        No weight may change meanwhile.
        """
        copies, weights = [*self._copies], [*self._weights]
        if self._head_copy is not None:
            copies.append(self._head_copy)
            weights.append(self._head)
        if copies:
            with torch.no_grad():
                torch._foreach_copy_(copies, weights)  # pyright: ignore[reportPrivateImportUsage]
        self._put(self._copies)
        self._policy.head_copy = self._head_copy
        try:
            yield
        finally:
            self._put(self._weights)
            self._policy.head_copy = None

    def differentiate(self) -> None:
        """Have the next pass through the model give gradients to its float32 weights; call it once for each pass."""
        for group in self._groups:
            outputs = _InPlaceOf.apply(self._copies[group], *self._weights[group])
            self._put(outputs, group)  # type: ignore[arg-type]

    def _put(self, tensors: Sequence[Tensor], group: slice = slice(None)) -> None:
        """Put tensors in the places of the weights, where modules find them; what is there need not be a parameter."""
        for tensor, places in zip(tensors, self._places[group], strict=True):
            for parameters, name in places:
                parameters[name] = tensor


class _InPlaceOf(torch.autograd.Function):
    """Takes float32 weights, returns their copies, and takes the copies' gradients back to the weights."""

    @staticmethod
    def forward(ctx: Any, copies: Sequence[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # what a pass does not use gets no gradient
        return tuple(copy.detach() for copy in copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        found = [gradient for gradient in gradients if gradient is not None]
        wide = [torch.empty_like(gradient, dtype=torch.float32) for gradient in found]
        if found:
            torch._foreach_copy_(wide, found)  # pyright: ignore[reportPrivateImportUsage]
        each = iter(wide)
        return None, *(None if gradient is None else next(each) for gradient in gradients)


def _groups(weights: Sequence[Tensor]) -> list[slice]:
    """Cut the weights, in the order of the model, into runs of about `GROUP` elements."""
    starts, size = [0], 0
    for index, weight in enumerate(weights):
        if size >= GROUP:
            starts.append(index)
            size = 0
        size += weight.numel()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(weights)], strict=True)]
