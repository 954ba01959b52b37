"""Episodes into packed micro-batches: no padding, and each prompt computed once for all its episodes.

A micro-batch is one stream of N tokens: for every prompt in it, the prompt's tokens, then those that follow it in each
of its episodes up to the last trained one, whose successor nobody asks for; then the further rows of these episodes,
each after a prompt of its own. Attention knows the stream as segments: a prompt sees itself, what follows sees its
prompt and itself. So all but attention is computed once a prompt, not once a sample. Tokens that are not trained on
are context only: the head never sees the states that predict them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapo_rl.types import Place, Row

Array: TypeAlias = NDArray[Any]
_NOTHING = np.arange(0)


@dataclass(frozen=True, slots=True)
class Item:
    """What the trainer needs of one episode.

    Example:
        >>> Item([Row([5, 6], [8, 9])], advantage=-1.0, weight=0.25).rows[0].num_trained
        2
    """

    rows: Sequence[Row]
    """The first follows the prompt of the group, each other a prompt of its own."""
    advantage: float
    """Shared by all trained tokens."""
    weight: float
    """Aggregation weight of each of them (`sapo_rl.losses.token_weights`)."""
    place: Place | None = None
    """Where its sample stands in the step; only what is told of its tokens asks."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """One micro-batch: N stream tokens, of which T are trained on; those of an episode are one of S sequences.

    Example:
        >>> items = [Item([Row([5, 6], [7])], 1.0, 0.5), Item([Row([5, 6], [8, 9])], -1.0, 0.25)]
        >>> batch = pack([items], budget=16)[0]
        >>> batch.input_ids, batch.targets  # the prompt once; a last token is predicted, but predicts nothing
        (tensor([5, 6, 8]), tensor([7, 8, 9]))
        >>> batch.position_ids, batch.hidden_index, batch.sequence_ids
        (tensor([0, 1, 2]), tensor([1, 1, 2]), tensor([0, 1, 1]))
    """

    input_ids: Tensor
    """(N,) int64"""
    position_ids: Tensor
    """(N,) int64: the position within the own row, prompt included."""
    kv_index: Tensor
    """(K,) int64 into the stream: the keys that the segments see, one segment after the other."""
    cu_seq_q: Tensor
    """(segments + 1,) int32: where each segment's queries start in the stream."""
    cu_seq_k: Tensor
    """(segments + 1,) int32: where each segment's keys start in `kv_index`."""
    max_q: int
    max_k: int
    hidden_index: Tensor
    """(T,) int64 into the stream: the position whose hidden state predicts the trained token."""
    targets: Tensor
    """(T,) int64: the trained tokens, episode by episode."""
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
    """Cut groups (episodes of one prompt each) into micro-batches of about `budget` stream tokens, evenly filled.

    A group stays whole where it fits; one that does not is cut, and its prompt computed once in each part. It is cut,
    too, where an episode's prompt is not that of the one before: an environment may add to it what it likes. An episode
    is never cut: one that is longer than the budget, all its rows together, makes a micro-batch of its own. Sequences
    are the episodes in their order, from the first micro-batch to the last.
    """
    units = [unit for group in groups for unit in _cut(group, budget)]
    costs = [stream_tokens(unit) for unit in units]
    count = len(_fill(costs, budget))
    low, high = 0, budget
    while low + 1 < high:  # the smallest capacity that needs no more micro-batches: no small rest at the end
        middle = (low + high) // 2
        low, high = (low, middle) if len(_fill(costs, middle)) == count else (middle, high)
    return [_lay_out(units[span]) for span in _fill(costs, high)]


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


def _fill(costs: Sequence[int], capacity: int) -> list[slice]:
    """Cut units into micro-batches of `capacity` tokens, in their order; one that does not fit has its own."""
    starts: list[int] = []
    room = 0
    for place, cost in enumerate(costs):
        if not starts or cost > room:
            starts.append(place)
            room = capacity
        room -= cost
    return [slice(start, stop) for start, stop in pairwise([*starts, len(costs)])]


def empty_batch() -> PackedBatch:
    """A micro-batch of weight 0: what a rank without work runs, so that it takes part in every collective.

    No size in it is 0 or 1, for which torch.compile would make graphs of their own.
    """
    return _lay_out([[Item([Row([0, 0], [0, 0, 0], rollout_logps=[0.0, 0.0, 0.0])], advantage=0.0, weight=0.0)]])


def stream_tokens(unit: Sequence[Item]) -> int:
    """Return how many tokens the episodes of one prompt take in a stream."""
    return len(unit[0].rows[0].prompt_ids) + sum(map(_own_tokens, unit))


def _own_tokens(item: Item) -> int:
    """How many tokens an episode adds to a stream that has its group's prompt."""
    first, *others = item.rows
    return _following(first) + sum(len(row.prompt_ids) + _following(row) for row in others)


def _following(row: Row) -> int:
    return max(0, row.trained_until - 1)


def _cut(group: Sequence[Item], budget: int) -> list[list[Item]]:
    parts: list[list[Item]] = []
    room = 0
    for item in group:
        cost, prompt = _own_tokens(item), item.rows[0].prompt_ids
        if not parts or cost > room or prompt != parts[-1][0].rows[0].prompt_ids:
            parts.append([])
            room = budget - len(prompt)
        parts[-1].append(item)
        room -= cost
    return parts


class _Stream:
    """A micro-batch's stream while it grows, segment by segment."""

    def __init__(self) -> None:
        self.ids: list[Array] = []
        self.positions: list[Array] = []
        self.keys: list[Array] = []
        self.q_lengths: list[int] = []
        self.k_lengths: list[int] = []
        self._end = 0

    def add(self, ids: Array, seen: Array = _NOTHING) -> Array:
        """Append a segment that sees the places `seen` and itself; return its own places."""
        own = np.arange(self._end, self._end + len(ids))
        if len(own):
            self._end += len(own)
            self.ids.append(ids)
            self.positions.append(np.arange(len(seen), len(seen) + len(own)))
            self.keys += seen, own
            self.q_lengths.append(len(own))
            self.k_lengths.append(len(seen) + len(own))
        return own

    def follow(self, prompt: Array, row: Row) -> tuple[list[Array], Array]:
        """Append what follows a prompt; return the places that predict the trained tokens, and these tokens."""
        tokens = np.asarray(row.token_ids, np.int64)[: row.trained_until]
        before = [prompt[-1:], self.add(tokens[:-1], prompt)]
        if row.loss_mask is None:
            return before, tokens
        trained = np.concatenate([_NOTHING, *(np.arange(start, end) for start, end in row.loss_mask)])
        return [np.concatenate(before)[trained]], tokens[trained]


def _lay_out(units: Sequence[Sequence[Item]]) -> PackedBatch:
    stream = _Stream()
    hidden: list[Array] = []
    targets: list[Array] = []
    lengths: list[int] = []
    for unit in units:
        prompt = stream.add(np.asarray(unit[0].rows[0].prompt_ids, np.int64))
        firsts = [stream.follow(prompt, item.rows[0]) for item in unit]
        for item, first in zip(unit, firsts, strict=True):  # trained tokens go by episode, as the losses want them
            others = (stream.follow(stream.add(np.asarray(r.prompt_ids, np.int64)), r) for r in item.rows[1:])
            lengths.append(0)
            for places, tokens in (first, *others):
                hidden += places
                targets.append(tokens)
                lengths[-1] += len(tokens)
    items = [item for unit in units for item in unit]
    rows = [row for item in items for row in item.rows]
    logps = [row.rollout_logps for row in rows if row.trained_until or row.rollout_logps is not None]
    return PackedBatch(
        input_ids=_joined(stream.ids),
        position_ids=_joined(stream.positions),
        kv_index=_joined(stream.keys),
        cu_seq_q=torch.tensor([0, *accumulate(stream.q_lengths)], dtype=torch.int32),
        cu_seq_k=torch.tensor([0, *accumulate(stream.k_lengths)], dtype=torch.int32),
        max_q=max(stream.q_lengths),
        max_k=max(stream.k_lengths),
        hidden_index=_joined(hidden),
        targets=_joined(targets),
        sequence_ids=_joined([np.repeat(np.arange(len(items)), lengths)]),
        advantages=_joined([np.repeat(np.asarray([item.advantage for item in items], np.float32), lengths)]),
        token_weights=_joined([np.repeat(np.asarray([item.weight for item in items], np.float32), lengths)]),
        rollout_logps=None if None in logps else _joined([np.asarray(one, np.float32) for one in logps]),
        num_sequences=len(items),
    )


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]


def _joined(parts: Sequence[Array]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))
