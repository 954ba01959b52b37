"""Spreading the batch over 1, 2 or 3 ranks leaves loss and gradient unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import pytest
import torch
from losses.batches import SETTINGS, loss_and_gradient, make_batch
from losses.rank_worker import LENGTHS, SEED

from sapo_rl.losses import AGGREGATION_MODES


@pytest.mark.multi
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_add_up_to_one_process(world: int, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    forked.ranks("losses.rank_worker", world, str(world), str(out))
    written = json.loads(out.read_text())
    assert written["world"] == world

    batch = make_batch(LENGTHS, SEED)
    everything = [list(range(len(LENGTHS)))]
    for name in SETTINGS:
        for mode in AGGREGATION_MODES:
            loss, gradient = loss_and_gradient(batch, everything, mode, name, kl={"coef": 0.1, "kind": "k3"})
            expected = torch.cat([loss.reshape(1), gradient])
            found = torch.tensor(written["results"][f"{name} {mode}"], dtype=torch.float64)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
