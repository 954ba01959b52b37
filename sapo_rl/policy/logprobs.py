"""Log-probability and entropy of the trained tokens, without a [tokens, vocabulary] tensor in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

CHUNK = {"cuda": 2**29, "cpu": 2**26}
"""Logits that exist at one time, by device type: 1 GiB of bfloat16 on a GPU."""


Statistics: TypeAlias = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
Gradient: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def token_logps(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, head_copy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return log-probability and entropy of each token.

    Args:
        hidden: (T, d), the states that predict the tokens, in the compute dtype.
        head: (V, d), the weight of the language-model head, in any dtype; multiplied in that of `hidden`.
        targets: (T,) int64, the tokens.
        temperature: the logits are divided by it, as vLLM's were when it sampled.
        head_copy: `head` in the dtype of `hidden`, where there is such a copy; it gets no gradient.

    Returns:
        (T,) float32 log-probabilities with a gradient, and (T,) float32 entropies without, in nats.
    """
    return _HeadLogps.apply(hidden, head, targets, temperature, head_copy)  # type: ignore[return-value]


class _HeadLogps(torch.autograd.Function):
    """Chunks of logits, made anew in the backward pass instead of kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, head_copy: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weight = head.to(hidden.dtype) if head_copy is None else head_copy
        of_logits = passes(hidden.device)[0]
        found = [of_logits(hidden[span] @ weight.T, targets[span], temperature) for span in _spans(len(hidden), head)]
        logps, entropy, normalisers = (torch.cat(column) for column in zip(*found, strict=True))
        ctx.save_for_backward(hidden, head, targets, normalisers, head_copy)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:  # type: ignore[override]
        hidden, head, targets, normalisers, head_copy = ctx.saved_tensors
        weight = head.to(hidden.dtype) if head_copy is None else head_copy
        at_logits = passes(hidden.device)[1]
        grad_logps = grad_logps.contiguous()
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for span in _spans(len(hidden), head):
            grad_logits = at_logits(
                hidden[span] @ weight.T, targets[span], normalisers[span], grad_logps[span], ctx.temperature
            )
            torch.mm(grad_logits, weight, out=grad_hidden[span])
            if grad_head is not None:
                add_product(grad_head, grad_logits.T, hidden[span])
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype), None, None, None


def passes(device: torch.device) -> tuple[Statistics, Gradient]:
    """Return what is done with a chunk of logits, forward and backward: Triton's kernels on a GPU, else plain torch."""
    if device.type == "cuda":
        from sapo_rl.policy import kernels  # Triton comes with torch's CUDA builds only

        return kernels.statistics, kernels.gradient
    return statistics, gradient


def statistics(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probability of the target, entropy and log-sum-exp of each row of (T, V) logits, (T,) float32."""
    logits = logits.float() / temperature
    normaliser = logits.logsumexp(-1)
    logits -= normaliser[:, None]
    return logits.gather(1, targets[:, None])[:, 0], -(logits.exp() * logits).sum(-1), normaliser


def gradient(logits: Tensor, targets: Tensor, normalisers: Tensor, grad_logps: Tensor, temperature: float) -> Tensor:
    """Return the gradient at (T, V) logits, in their dtype, from that at the log-probabilities."""
    found = (logits.float() / temperature - normalisers[:, None]).exp_().neg_()  # d logp / d logits = one-hot - softmax
    found.scatter_add_(1, targets[:, None], torch.ones_like(found[:, :1]))
    found *= grad_logps[:, None] / temperature
    return found.to(logits.dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to the float32 `total` in place; on a GPU without rounding the product to their dtype."""
    if total.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


def _spans(count: int, head: Tensor) -> list[slice]:
    """Cut `count` tokens into chunks of equal size, but for the last."""
    size = max(1, CHUNK[head.device.type] // len(head))
    return [slice(start, start + size) for start in range(0, count, size)]
