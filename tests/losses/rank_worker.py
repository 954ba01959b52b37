"""One rank of the multi-rank test: its share of the batch, in two micro-batches; rank 0 writes the summed result.

Started by torchrun with the world size to expect and the file to write.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from losses.batches import SETTINGS, loss_and_gradient, make_batch

from sapo_rl.losses import AGGREGATION_MODES, Reduction

LENGTHS = [3, 5, 1, 0, 6, 2, 4]
SEED = 11


def total(values: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(values)
    return values


def joined(values: torch.Tensor) -> torch.Tensor:
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, values)
    return torch.cat(everyone)


def main() -> None:
    world, path = int(sys.argv[1]), Path(sys.argv[2])
    assert int(os.environ["WORLD_SIZE"]) == world
    dist.init_process_group("gloo")
    assert dist.get_world_size() == world
    rank = dist.get_rank()
    batch = make_batch(LENGTHS, SEED)
    mine = list(range(rank, len(LENGTHS), world))
    results = {}
    for name in SETTINGS:
        for mode in AGGREGATION_MODES:
            parts = [mine[:1], mine[1:]]
            across = Reduction(total, joined)
            loss, gradient = loss_and_gradient(batch, parts, mode, name, across, kl={"coef": 0.1, "kind": "k3"})
            both = torch.cat([loss.reshape(1), gradient])
            dist.all_reduce(both)
            results[f"{name} {mode}"] = both.tolist()
    if rank == 0:
        path.write_text(json.dumps({"world": dist.get_world_size(), "results": results}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
