"""Log-probability and entropy of the completion tokens, without a [tokens, vocabulary] tensor in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 1024
"""Tokens whose logits exist at one time."""


def token_logps(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probability and entropy of each token.

    Args:
        hidden: (T, d), the states that predict the tokens, in the compute dtype.
        head: (V, d), the weight of the language-model head, in any dtype; multiplied in that of `hidden`.
        targets: (T,) int64, the tokens.
        temperature: the logits are divided by it, as vLLM's were when it sampled.

    Returns:
        (T,) float32 log-probabilities with a gradient, and (T,) float32 entropies without, in nats.
    """
    return _HeadLogps.apply(hidden, head, targets, temperature)  # type: ignore[return-value]


class _HeadLogps(torch.autograd.Function):
    """Chunks of logits, made anew in the backward pass instead of kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        weight = head.to(hidden.dtype)
        logps, entropies, normalisers = [], [], []
        for states, tokens in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            logits = _logits(states, weight, temperature)
            normaliser = logits.logsumexp(-1)
            logps.append(logits.gather(1, tokens[:, None])[:, 0] - normaliser)
            logits -= normaliser[:, None]
            entropies.append(-(logits.exp() * logits).sum(-1))
            normalisers.append(normaliser)
        ctx.save_for_backward(hidden, head, targets, torch.cat(normalisers))
        ctx.temperature = temperature
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logps), entropy

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        hidden, head, targets, normalisers = ctx.saved_tensors
        weight = head.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32)
        spans = [slice(start, start + CHUNK) for start in range(0, len(hidden), CHUNK)]
        for span in spans:
            logits = _logits(hidden[span], weight, ctx.temperature)
            grad_logits = (logits - normalisers[span, None]).exp_().neg_()  # d logp / d logits = one-hot - softmax
            grad_logits.scatter_add_(1, targets[span, None], torch.ones_like(grad_logits[:, :1]))
            grad_logits *= grad_logps[span, None] / ctx.temperature
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[span] = grad_logits @ weight
            grad_head += grad_logits.T @ hidden[span]
        return grad_hidden, grad_head.to(head.dtype), None, None


def _logits(states: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return (states @ weight.T).float() / temperature
