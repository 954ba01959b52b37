"""Samples into packed micro-batches: no padding, and each prompt computed once for all its completions.

A micro-batch is one stream of N tokens: for every prompt in it, the prompt's tokens, then the tokens of each of its
completions but their last, whose successor nobody asks for. Attention knows the stream as segments: a prompt sees
itself, a completion sees its prompt and itself. So all but attention is computed once a prompt, not once a sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Item:
    """What the trainer needs of one sample."""

    prompt: Sequence[int]
    """Prompt tokens."""
    completion: Sequence[int]
    """Completion tokens, at least one."""
    advantage: float
    """Shared by all tokens of the completion."""
    weight: float
    """Aggregation weight of each of its tokens (`sapo_rl.losses.token_weights`)."""
    rollout_logps: Sequence[float] | None = None
    """vLLM's log-probabilities of the completion's tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """One micro-batch: N stream tokens, of which T completion tokens of S sequences are trained on."""

    input_ids: Tensor
    """(N,) int64"""
    position_ids: Tensor
    """(N,) int64: the position within the own sequence, prompt included."""
    kv_index: Tensor
    """(K,) int64 into the stream: the keys that the segments see, one segment after the other."""
    cu_seq_q: Tensor
    """(segments + 1,) int32: where each segment's queries start in the stream."""
    cu_seq_k: Tensor
    """(segments + 1,) int32: where each segment's keys start in `kv_index`."""
    max_q: int
    max_k: int
    hidden_index: Tensor
    """(T,) int64 into the stream: the position whose hidden state predicts the completion token."""
    targets: Tensor
    """(T,) int64: the completion tokens."""
    sequence_ids: Tensor
    """(T,) int64 in 0..S-1, ascending."""
    advantages: Tensor
    """(T,) float32"""
    token_weights: Tensor
    """(T,) float32"""
    rollout_logps: Tensor | None
    """(T,) float32, or None where vLLM returned none."""
    num_sequences: int
    """S"""

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch with its tensors on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if isinstance(v, Tensor)})


def pack(groups: Iterable[Sequence[Item]], budget: int) -> list[PackedBatch]:
    """Cut groups (samples of one prompt each) into micro-batches of about `budget` stream tokens, evenly filled.

    A group stays whole where it fits; one that does not is cut, and its prompt computed once in each part. A single
    sample longer than the budget makes a micro-batch of its own.
    """
    units = [unit for group in groups for unit in _cut(list(group), budget)]
    count = len(_fill(units, budget))
    low, high = 0, budget
    while low + 1 < high:  # the smallest capacity that needs no more micro-batches: no small rest at the end
        middle = (low + high) // 2
        low, high = (low, middle) if len(_fill(units, middle)) == count else (middle, high)
    return [_lay_out(batch) for batch in _fill(units, high)]


def join(batches: Sequence[PackedBatch]) -> PackedBatch:
    """Return several micro-batches as one, with the same tokens and sequences in the same order."""
    streams = _starts([len(batch.input_ids) for batch in batches])
    keys = _starts([len(batch.kv_index) for batch in batches])
    sequences = _starts([batch.num_sequences for batch in batches])

    def joined(name: str, starts: Sequence[int] | None = None) -> Tensor:
        parts = [getattr(batch, name) for batch in batches]
        return torch.cat(parts if starts is None else [part + at for part, at in zip(parts, starts, strict=True)])

    def bounds(name: str, starts: Sequence[int]) -> Tensor:
        parts = [getattr(batch, name) + at for batch, at in zip(batches, starts, strict=True)]
        return torch.cat([part[:-1] for part in parts[:-1]] + parts[-1:])

    return PackedBatch(
        input_ids=joined("input_ids"),
        position_ids=joined("position_ids"),
        kv_index=joined("kv_index", streams),
        cu_seq_q=bounds("cu_seq_q", streams),
        cu_seq_k=bounds("cu_seq_k", keys),
        max_q=max(batch.max_q for batch in batches),
        max_k=max(batch.max_k for batch in batches),
        hidden_index=joined("hidden_index", streams),
        targets=joined("targets"),
        sequence_ids=joined("sequence_ids", sequences),
        advantages=joined("advantages"),
        token_weights=joined("token_weights"),
        rollout_logps=joined("rollout_logps") if all(b.rollout_logps is not None for b in batches) else None,
        num_sequences=sum(batch.num_sequences for batch in batches),
    )


def spread(costs: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
    """Spread units over ranks, the costliest first: each stays where that fits into a fair share, or fills the idlest.

    Args:
        costs: of the units that each rank has.

    Returns:
        The new rank of each of them, and the sum of costs on each rank.
    """
    owners = [[rank] * len(own) for rank, own in enumerate(costs)]
    loads = [0] * len(costs)
    units = [(cost, rank, place) for rank, own in enumerate(costs) for place, cost in enumerate(own)]
    slack = min(units, default=(0, 0, 0))[0] / 2  # what the smallest unit could not even out is no reason to move one
    fair = sum(map(sum, costs)) / len(costs) + slack
    for cost, rank, place in sorted(units, key=lambda unit: -unit[0]):
        owner = rank if loads[rank] + cost <= fair else loads.index(min(loads))
        owners[rank][place] = owner
        loads[owner] += cost
    return owners, loads


def _fill(units: Sequence[list[Item]], capacity: int) -> list[list[list[Item]]]:
    batches: list[list[list[Item]]] = []
    room = 0
    for unit in units:
        cost = stream_tokens(unit)
        if not batches or cost > room:
            batches.append([])
            room = capacity
        batches[-1].append(unit)
        room -= cost
    return batches


def empty_batch() -> PackedBatch:
    """A micro-batch of weight 0: what a rank without work runs, so that it takes part in every collective.

    No size in it is 0 or 1, for which torch.compile would make graphs of their own.
    """
    return _lay_out([[Item([0, 0], [0, 0, 0], advantage=0.0, weight=0.0, rollout_logps=[0.0, 0.0, 0.0])]])


def stream_tokens(unit: Sequence[Item]) -> int:
    """Return how many tokens the samples of one prompt take in a stream."""
    return len(unit[0].prompt) + sum(len(item.completion) - 1 for item in unit)


def _cut(group: list[Item], budget: int) -> list[list[Item]]:
    parts: list[list[Item]] = []
    for item in group:
        if parts and stream_tokens([*parts[-1], item]) <= budget:
            parts[-1].append(item)
        else:
            parts.append([item])
    return parts


def _lay_out(units: Sequence[Sequence[Item]]) -> PackedBatch:
    ids: list[Array] = []
    positions: list[Array] = []
    keys: list[Array] = []
    hidden: list[Array] = []
    targets: list[Array] = []
    q_lengths: list[int] = []
    k_lengths: list[int] = []
    end = 0
    for unit in units:
        prompt = np.asarray(unit[0].prompt, np.int64)
        prompt_span = np.arange(end, end + len(prompt))
        end += len(prompt)
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        keys.append(prompt_span)
        q_lengths.append(len(prompt))
        k_lengths.append(len(prompt))
        for item in unit:
            completion = np.asarray(item.completion, np.int64)
            own = np.arange(end, end + len(completion) - 1)
            end += len(own)
            targets.append(completion)
            hidden += prompt_span[-1:], own
            if not len(own):
                continue
            ids.append(completion[:-1])
            positions.append(np.arange(len(prompt), len(prompt) + len(own)))
            keys += prompt_span, own
            q_lengths.append(len(own))
            k_lengths.append(len(prompt) + len(own))
    items = [item for unit in units for item in unit]
    lengths = [len(target) for target in targets]
    logps = [np.asarray(item.rollout_logps, np.float32) for item in items if item.rollout_logps is not None]
    return PackedBatch(
        input_ids=_joined(ids),
        position_ids=_joined(positions),
        kv_index=_joined(keys),
        cu_seq_q=torch.tensor([0, *accumulate(q_lengths)], dtype=torch.int32),
        cu_seq_k=torch.tensor([0, *accumulate(k_lengths)], dtype=torch.int32),
        max_q=max(q_lengths),
        max_k=max(k_lengths),
        hidden_index=_joined(hidden),
        targets=_joined(targets),
        sequence_ids=_joined([np.repeat(np.arange(len(items)), lengths)]),
        advantages=_joined([np.repeat(np.asarray([item.advantage for item in items], np.float32), lengths)]),
        token_weights=_joined([np.repeat(np.asarray([item.weight for item in items], np.float32), lengths)]),
        rollout_logps=_joined(logps) if len(logps) == len(items) else None,
        num_sequences=len(items),
    )


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]


def _joined(parts: Sequence[Array]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))
