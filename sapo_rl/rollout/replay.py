"""Groups of earlier steps, trained on again in place of those that teach nothing (rollout replay, arXiv 2506.05316)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from sapo_rl.rollout.share import Share
from sapo_rl.types import Batch, Group, Prompt, Replayed, Row, Sample, Stop

Arrays: TypeAlias = dict[str, NDArray[Any]]
STOPS = list(Stop)


class Kept(NamedTuple):
    """A group that may be trained on again."""

    step: int
    """Whose batch it was written for."""
    group: Group
    """What an update needs of it: tokens, vLLM's log-probabilities, rewards."""


class ReplayBuffer:
    """The newest groups of a rank that teach something, from which each batch is filled where it has others.

    Which ones take part depends on the seed and the step alone. A group may be chosen in several steps, and once in
    each.

    Args:
        size: groups to keep.
        max_age: steps after which one is forgotten.
        seed: this rank's.
        keeps: whether a scored group teaches something.
        rewards: names of the rewards from which advantages are made.

    Example:
        >>> batch = buffer.fill(step, batch)
        >>> trainer.train_on(batch.trained, timers)
    """

    def __init__(
        self, size: int, max_age: int, seed: str, keeps: Callable[[Group], bool], rewards: Sequence[str]
    ) -> None:
        self._size, self._max_age, self._seed = size, max_age, seed
        self._keeps, self._rewards = keeps, rewards
        self._kept: list[Kept] = []

    def fill(self, step: int, batch: Batch) -> Batch:
        """Return the batch with earlier groups in the places of those that teach nothing, as far as there are any.

        Its own groups that teach something are kept for later steps.
        """
        teaching = [self._keeps(group) for group in batch.groups]
        free = [place for place, teaches in enumerate(teaching) if not teaches]
        self._kept = [one for one in self._kept if step - one.step <= self._max_age]
        rng = random.Random(f"replay/{self._seed}/{step}")
        chosen = rng.sample(self._kept, min(len(free), len(self._kept)))
        replayed = {place: Replayed(one.group, step - one.step) for place, one in zip(free, chosen, strict=False)}
        fresh = [group for group, teaches in zip(batch.groups, teaching, strict=True) if teaches]
        self._kept = [*self._kept, *(Kept(step, _bare(group, self._rewards)) for group in fresh)][-self._size :]
        return replace(batch, replayed=replayed)

    def state(self) -> Arrays:
        """Return what `load` needs."""
        return pack(self._kept, self._rewards)

    def load(self, files: Sequence[Path], share: Share, prompts: Mapping[int, Prompt]) -> None:
        """Go on where states were taken; with another number of ranks their groups are dealt out anew.

        Groups with other rewards than those of this run are left out.

        Args:
            files: with the state of each rank, in their order.
            share: this rank's.
            prompts: by `Prompt.index`.
        """
        if len(files) == share.count:
            self._kept = unpack(load_file(files[share.index]), prompts, self._rewards)
        else:
            everything = [one for file in files for one in unpack(load_file(file), prompts, self._rewards)]
            everything.sort(key=lambda one: one.step)
            self._kept = everything[share.index :: share.count][-self._size :]


def _bare(group: Group, rewards: Sequence[str]) -> Group:
    """A group without what an update does not need."""
    return replace(
        group,
        samples=[
            Sample(one.rows, one.stop, one.versions, rewards={name: one.rewards[name] for name in rewards})
            for one in group.samples
        ],
    )


def pack(kept: Sequence[Kept], rewards: Sequence[str]) -> Arrays:
    """Return groups as flat arrays: of groups, of their samples, of the rows of these, and of the tokens of these."""
    samples = [sample for one in kept for sample in one.group.samples]
    rows = [row for sample in samples for row in sample.rows]
    arrays: dict[str, Any] = {
        "group/step": [one.step for one in kept],
        "group/prompt_index": [one.group.prompt.index for one in kept],
        "group/samples": [len(one.group.samples) for one in kept],
        "sample/stop": [STOPS.index(sample.stop) for sample in samples],
        "sample/first_version": [sample.versions[0] for sample in samples],
        "sample/last_version": [sample.versions[1] for sample in samples],
        "sample/rows": [len(sample.rows) for sample in samples],
        "row/prompt": [len(row.prompt_ids) for row in rows],
        "row/tokens": [len(row.token_ids) for row in rows],
        "row/spans": [-1 if row.loss_mask is None else len(row.loss_mask) for row in rows],
        "row/logps": [len(row.rollout_logps or []) for row in rows],
    }
    found: Arrays = {name: np.array(values, np.int64) for name, values in arrays.items()}
    found |= {
        f"reward/{name}": np.array([_nan(sample.rewards[name]) for sample in samples], np.float64) for name in rewards
    }
    return found | {
        "prompt_ids": np.array([token for row in rows for token in row.prompt_ids], np.int32),
        "token_ids": np.array([token for row in rows for token in row.token_ids], np.int32),
        "spans": np.array([place for row in rows for span in row.loss_mask or [] for place in span], np.int64),
        "logps": np.array([logp for row in rows for logp in row.rollout_logps or []], np.float32),
    }


def unpack(arrays: Arrays, prompts: Mapping[int, Prompt], rewards: Sequence[str]) -> list[Kept]:
    """Return the groups that `pack` was given, of these prompts; none where it was given other rewards."""
    if {f"reward/{name}" for name in rewards} != {name for name in arrays if name.startswith("reward/")}:
        return []
    flat = {name: values.tolist() for name, values in arrays.items()}
    rows = _rows(flat)
    columns = zip(*(flat[f"reward/{name}"] for name in rewards), strict=True)
    values = [dict(zip(rewards, map(_none, row), strict=True)) for row in columns]
    samples = (
        Sample(list(islice(rows, count)), STOPS[stop], (first, last), rewards=own)
        for count, stop, first, last, own in zip(
            *(flat[f"sample/{name}"] for name in ("rows", "stop", "first_version", "last_version")), values, strict=True
        )
    )
    groups = zip(*(flat[f"group/{name}"] for name in ("step", "prompt_index", "samples")), strict=True)
    found = [(step, index, list(islice(samples, count))) for step, index, count in groups]
    return [Kept(step, Group(prompts[index], own)) for step, index, own in found if index in prompts]


def _rows(flat: Mapping[str, list[Any]]) -> Iterator[Row]:
    prompt_ids, token_ids, places, logps = (iter(flat[name]) for name in ("prompt_ids", "token_ids", "spans", "logps"))
    names = ("prompt", "tokens", "spans", "logps")
    for prompt, tokens, spans, count in zip(*(flat[f"row/{name}"] for name in names), strict=True):
        loss_mask = None if spans < 0 else [(next(places), next(places)) for _ in range(spans)]
        yield Row(
            list(islice(prompt_ids, prompt)), list(islice(token_ids, tokens)), loss_mask, list(islice(logps, count))
        )


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _none(value: float) -> float | None:
    return None if isnan(value) else value
