"""What the micro-batches of a step leave behind, and the step's metrics out of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from sapo_rl.config.loss import LossConfig
from sapo_rl.losses import LossOutputs, Reduction, policy_metrics, token_ratio
from sapo_rl.policy.packing import Item, PackedBatch
from sapo_rl.types import TokenValues

_MEANS = {"policy/entropy": "entropy", "policy/kl_ref": "kl", "mismatch/correction_mean": "correction"}
"""Metrics that are the mean of a column of the traces."""
_BY_TOKEN = ("logps", "old_logps", "rollout_logps", "gradient_weight", "entropy", "kl", "correction")
"""Columns that are kept token by token, beside the ratio."""


class Trace(NamedTuple):
    """What one micro-batch of T tokens leaves for the step's metrics, on the device.

    Example:
        >>> Trace({"logps": torch.tensor([-0.1, -2.3])}, torch.tensor([0, 0]), num_sequences=1)
    """

    columns: dict[str, Tensor]
    """(T,) by name."""
    sequence_ids: Tensor
    """(T,) int64 in 0..num_sequences-1"""
    num_sequences: int


def trace(batch: PackedBatch, logps: Tensor, old_logps: Tensor, entropy: Tensor, outputs: LossOutputs) -> Trace:
    """Return what a micro-batch leaves: `logps`, `old_logps` and `entropy` are (T,) and detached."""
    columns = {
        "logps": logps,
        "old_logps": old_logps,
        "entropy": entropy,
        "advantages": batch.advantages,
        "gradient_weight": outputs.gradient_weight,
        "rollout_logps": batch.rollout_logps,
        "kl": outputs.kl,
        "correction": outputs.correction,
    }
    kept = {name: column for name, column in columns.items() if column is not None}
    return Trace(kept, batch.sequence_ids, batch.num_sequences)


def step_metrics(
    traces: Sequence[Trace],
    losses: Sequence[Tensor],
    norms: Sequence[Tensor],
    config: LossConfig,
    device: torch.device,
    across: Reduction,
) -> dict[str, float]:
    """Reduce the tokens of all updates and ranks once, with one transfer from the device.

    Args:
        traces: of this rank's micro-batches; it may have none.
        losses: of each update, 0-d, of all ranks together.
        norms: of each update's gradient before clipping, 0-d.
        config: of the loss.
        device: of the tensors.
        across: how the ranks' numbers become one.
    """
    found: dict[str, Tensor] = {
        "policy/loss": torch.stack(list(losses)).mean(),
        "policy/grad_norm": torch.stack(list(norms)).mean(),
        "policy/grad_norm_max": torch.stack(list(norms)).max(),
    }
    names, num_tokens = _extent(traces)
    if num_tokens:
        columns = {name: _column(traces, name, device) for name in names}
        for name, column in _MEANS.items():
            if column in columns:
                found[name] = across.total(columns.pop(column).sum()) / num_tokens
        found |= policy_metrics(
            **columns,
            sequence_ids=_sequence_ids(traces, device),
            num_sequences=sum(one.num_sequences for one in traces),
            tau_pos=config.tau_pos,
            tau_neg=config.tau_neg,
            num_tokens=num_tokens,
            across=across,
        )
    values = torch.stack([value.double() for value in found.values()]).tolist()
    return dict(zip(found, values, strict=True))


def token_values(items: Sequence[Sequence[Item]], traces: Sequence[Trace]) -> list[TokenValues]:
    """Return what one pass over a rank's share of a mini-batch made of each token.

    Args:
        items: the share, in the order in which it was packed.
        traces: of its micro-batches, in their order.
    """
    if not traces:
        return []
    whole = {name: torch.cat([one.columns[name] for one in traces]) for name in traces[0].columns}
    kept = {name: whole[name] for name in _BY_TOKEN if name in whole}
    kept["ratio"] = token_ratio(whole["logps"].double(), whole["old_logps"].double())
    flat = [item for group in items for item in group]
    ends = list(accumulate(sum(row.num_trained for row in item.rows) for item in flat))
    assert ends[-1] == len(whole["logps"])
    parts = {name: np.split(column.float().cpu().numpy(), ends[:-1]) for name, column in kept.items()}
    return [
        TokenValues(item.place, item.rows, item.advantage, item.weight, {name: parts[name][at] for name in parts})
        for at, item in enumerate(flat)
        if item.place is not None
    ]


def packed(traces: Sequence[Trace], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Return `logps`, `old_logps`, `advantages` (T,) float64, sequence ids and number of sequences of this rank."""
    logps, old_logps, advantages = (_column(traces, name, device) for name in ("logps", "old_logps", "advantages"))
    return logps, old_logps, advantages, _sequence_ids(traces, device), sum(one.num_sequences for one in traces)


def _extent(traces: Sequence[Trace]) -> tuple[list[str], int]:
    """The columns of the ranks' traces, of which some may have none, and how many tokens all have together."""
    own = (list(traces[0].columns) if traces else [], sum(len(one.sequence_ids) for one in traces))
    everyone: list[tuple[list[str], int]] = gather_object([own])
    return next((names for names, _ in everyone if names), []), sum(count for _, count in everyone)


def _column(traces: Sequence[Trace], name: str, device: torch.device) -> Tensor:
    """One column of this rank's traces, (T,) float64."""
    none = torch.empty(0, dtype=torch.float64, device=device)
    return torch.cat([none, *(one.columns[name].double() for one in traces)])


def _sequence_ids(traces: Sequence[Trace], device: torch.device) -> Tensor:
    """The sequence of each token, (T,) int64, counted over all of this rank's traces."""
    starts = accumulate((one.num_sequences for one in traces), initial=0)
    none = torch.empty(0, dtype=torch.int64, device=device)
    return torch.cat([none, *(one.sequence_ids + start for one, start in zip(traces, starts, strict=False))])
