"""Triton kernels of the language-model head on a GPU: the logits are read once forward, read and written once backward.

The same in plain torch, several passes over them, is in `sapo_rl.policy.logprobs`.
"""

# pyright: reportArgumentType=false
# A launch takes tensors and numbers where the kernel's body sees pointers and constants.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Logits of a row that a program holds at one time."""


def statistics(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probability of the target, entropy and log-sum-exp of each row, (T,) float32.

    Args:
        logits: (T, V), contiguous, before the division by `temperature`.
        targets: (T,) int64.
        temperature: above 0.
    """
    count, size = logits.shape
    logps, entropies, normalisers = torch.empty(3, count, dtype=torch.float32, device=logits.device).unbind()
    _statistics[(count,)](logits, targets, logps, entropies, normalisers, 1 / temperature, size=size, block=BLOCK)
    return logps, entropies, normalisers


def gradient(logits: Tensor, targets: Tensor, normalisers: Tensor, grad_logps: Tensor, temperature: float) -> Tensor:
    """Overwrite `logits` with the gradient at them and return it.

    Args:
        logits: (T, V), contiguous, as `statistics` had them.
        targets: (T,) int64.
        normalisers: (T,) float32, from `statistics`.
        grad_logps: (T,) float32, contiguous: the gradient at the log-probabilities.
        temperature: above 0.
    """
    count, size = logits.shape
    grid = (count, triton.cdiv(size, BLOCK))
    _gradient[grid](logits, targets, normalisers, grad_logps, 1 / temperature, size=size, block=BLOCK)
    return logits


@triton.jit
def _statistics(
    logits: tl.tensor,
    targets: tl.tensor,
    logps: tl.tensor,
    entropies: tl.tensor,
    normalisers: tl.tensor,
    scale: tl.tensor,
    size: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # rows times vocabulary may pass 2^31
    logits += row * size
    top = float("-inf")
    total = 0.0  # of exp(x - top)
    moment = 0.0  # of exp(x - top) x
    for start in range(0, size, block):
        columns = start + tl.arange(0, block)
        inside = columns < size
        x = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32) * scale
        higher = tl.maximum(top, tl.max(x, 0))
        shrink = tl.exp(top - higher)
        weights = tl.exp(x - higher)
        total = total * shrink + tl.sum(weights, 0)
        moment = moment * shrink + tl.sum(tl.where(inside, weights * x, 0.0), 0)
        top = higher
    normaliser = top + tl.log(total)
    chosen = tl.load(logits + tl.load(targets + row)).to(tl.float32) * scale
    tl.store(logps + row, chosen - normaliser)
    tl.store(entropies + row, normaliser - moment / total)
    tl.store(normalisers + row, normaliser)


@triton.jit
def _gradient(
    logits: tl.tensor,
    targets: tl.tensor,
    normalisers: tl.tensor,
    grad_logps: tl.tensor,
    scale: tl.tensor,
    size: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * size
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < size
    x = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32) * scale
    probabilities = tl.exp(x - tl.load(normalisers + row))
    target = (columns == tl.load(targets + row)).to(tl.float32)
    gradients = (target - probabilities) * tl.load(grad_logps + row) * scale
    tl.store(logits + columns, gradients, mask=inside)
