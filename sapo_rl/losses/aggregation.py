"""How token losses become one number, written as one weight per sequence so that any cut of the batch gives the same.

A loss is `(token_losses * token_weights(...)[sequence_ids]).sum()`. Because the weights hold the counts of the whole
optimiser batch, the losses and gradients of its parts (micro-batches, ranks) simply add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

AGGREGATION_MODES = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
"""The four ways, the paper's first."""


def token_weights(
    lengths: Tensor, mode: str, *, num_sequences: int, num_tokens: int, normalizer: float | None = None
) -> Tensor:
    """Return the weight of each token of each sequence, `(S,)` float64.

    With N = `num_sequences`, M = `num_tokens` and L = `normalizer`, a token of a sequence of length n weighs

    * `seq-mean-token-mean`: 1 / (N n), the paper's equation 5 and GRPO's;
    * `token-mean`: 1 / M, DAPO's;
    * `seq-mean-token-sum`: 1 / N;
    * `seq-mean-token-sum-norm`: 1 / (N L), Dr. GRPO's, with L the longest completion allowed.

    Args:
        lengths: `(S,)` trained tokens of each sequence at hand; a sequence of length 0 counts in N and adds nothing.
        mode: one of `AGGREGATION_MODES`.
        num_sequences: sequences of the whole optimiser batch, all ranks and micro-batches together.
        num_tokens: trained tokens of the whole optimiser batch.
        normalizer: L; only `seq-mean-token-sum-norm` reads it.

    Raises:
        ValueError: an unknown mode, or no positive `normalizer` where one is needed.
    """
    check_mode(mode)
    ones = torch.ones_like(lengths, dtype=torch.float64)
    sequences = max(num_sequences, 1)
    if mode == "token-mean":
        return ones / max(num_tokens, 1)
    if mode == "seq-mean-token-mean":
        return ones / (sequences * lengths.clamp(min=1))
    if mode == "seq-mean-token-sum":
        return ones / sequences
    if normalizer is None or normalizer <= 0:
        raise ValueError(f"loss_agg_mode '{mode}' needs a positive normalizer, found {normalizer}")
    return ones / (sequences * normalizer)


def check_mode(mode: str) -> None:
    """Raise ValueError unless `mode` is one of `AGGREGATION_MODES`."""
    if mode not in AGGREGATION_MODES:
        raise ValueError(f"unknown loss_agg_mode '{mode}'; valid: {', '.join(AGGREGATION_MODES)}")


def sequence_mean(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Return the mean `(S,)` of packed `values` `(T,)` over each sequence; 0 for a sequence without tokens."""
    totals = values.new_zeros(num_sequences).index_add(0, sequence_ids, values)
    counts = values.new_zeros(num_sequences).index_add(0, sequence_ids, torch.ones_like(values))
    return totals / counts.clamp(min=1)
