"""Rows and samples: which tokens are trained on."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, replace

import pytest

from sapo_rl.types import Row, Sample, Span, Stop


@pytest.mark.parametrize(
    ("mask", "trained", "until"),
    [(None, 6, 6), ([(0, 6)], 6, 6), ([(0, 2), (4, 5)], 3, 5), ([(3, 3)], 0, 3), ([], 0, 0)],
)
def test_spans_say_what_is_trained_on(mask: list[Span] | None, trained: int, until: int) -> None:
    row = Row([1], [5, 6, 7, 8, 9, 4], mask)
    assert (row.num_trained, row.trained_until) == (trained, until)


def test_a_sample_of_one_row_reads_as_one() -> None:
    sample = Sample([Row([1, 2], [5, 6, 0], [(0, 1)], [-0.5])], Stop.STOP, versions=(3, 4))
    assert sample.token_ids == [5, 6, 0]
    longer = replace(sample, rows=[*sample.rows, Row([7], [8, 9])])
    assert (sample.num_trained, longer.num_trained) == (1, 3)
    with pytest.raises(FrozenInstanceError):
        sample.stop = Stop.LENGTH  # pyright: ignore[reportAttributeAccessIssue]
    assert pickle.loads(pickle.dumps(longer)) == longer  # ranks exchange them
