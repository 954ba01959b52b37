"""Attention over a packed stream, entered into transformers' attention interface under the name `packed`."""

from __future__ import annotations

from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from sapo_rl.policy.packing import PackedBatch

NAME = "packed"
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""Fewer key-value heads than query heads: torch 2.11 takes them as they come, 2.13 wants to be told."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedBatch,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within the segments of `packed`.

    Args:
        module: the attention layer (unused; part of the interface).
        query: (1, heads, N, head size).
        key: (1, key-value heads, N, head size).
        value: as `key`.
        attention_mask: ignored: the segments say who sees whom.
        packed: the stream's layout.
        scaling: factor of the scores; by default 1 / sqrt(head size).

    Returns:
        (1, N, heads, head size), and None in place of the attention weights.
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, packed, scaling), None
    return _by_prompt(query, key, value, packed, scaling), None


AttentionInterface.register(NAME, packed_attention)


def _varlen(query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, scaling: float | None) -> Tensor:
    """Flash attention with variable lengths; causal from the bottom right, so completions see their whole prompt."""
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1).index_select(0, packed.kv_index),
        value[0].transpose(0, 1).index_select(0, packed.kv_index),
        packed.cu_seq_q,
        packed.cu_seq_k,
        packed.max_q,
        packed.max_k,
        scale=scaling,
        window_size=(-1, 0),
        **GROUPED,
    )
    assert isinstance(out, Tensor)
    return out[None]


def _by_prompt(query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, scaling: float | None) -> Tensor:
    """One masked call for each prompt with its completions: few calls, which is what counts on a CPU."""
    outs = []
    for start, stop, mask in prompt_masks(packed):
        span = slice(start, stop)
        outs.append(
            scaled_dot_product_attention(
                query[:, :, span], key[:, :, span], value[:, :, span], attn_mask=mask, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(outs, dim=2).transpose(1, 2)


@lru_cache(maxsize=2)  # every layer asks for the same batch
def prompt_masks(packed: PackedBatch) -> list[tuple[int, int, Tensor]]:
    """Return for each prompt its span (start, stop) of the stream and who sees whom in it, (length, length) bool."""
    q, k = packed.cu_seq_q.tolist(), packed.cu_seq_k.tolist()
    found: list[tuple[int, int, list[tuple[int, int]]]] = []
    for start, stop, k_start, k_stop in zip(q, q[1:], k, k[1:], strict=False):
        if k_stop - k_start == stop - start:  # sees only itself: a prompt
            found.append((start, stop, []))
        else:
            prompt_start, _, completions = found[-1]
            found[-1] = (prompt_start, stop, [*completions, (start, stop)])
    return [(start, stop, _mask(start, stop, spans, packed.input_ids.device)) for start, stop, spans in found]


def _mask(start: int, stop: int, completions: list[tuple[int, int]], device: torch.device) -> Tensor:
    mask = torch.ones(stop - start, stop - start, dtype=torch.bool, device=device).tril()
    first = completions[0][0] if completions else stop
    for begin, end in completions:
        mask[begin - start : end - start, first - start : begin - start] = False
    return mask
