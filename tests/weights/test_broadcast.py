"""Weights through a real process group; gloo takes NCCL's place on the CPU."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sapo_rl.weights import rendezvous as group_module
from sapo_rl.weights.buffer import BLOCK_BYTES, WeightBlocks
from sapo_rl.weights.rendezvous import Group, Rendezvous, RendezvousHost, join, receive_tensors, send_blocks

CPU = torch.device("cpu")


def test_every_worker_receives_every_tensor_in_the_engines_dtype() -> None:
    weights = {
        "first": torch.randn(3, 5),
        "large": torch.randn(BLOCK_BYTES // 2 + 1),  # a block of its own, while the first block is still open
        "scalar": torch.tensor(2.5),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "empty": torch.empty(0, 4),
    }
    blocks = WeightBlocks(torch.bfloat16, lambda size: torch.empty(size, dtype=torch.uint8))
    blocks.fill(weights.items())
    layout = json.dumps(blocks.layout() | {"blocks": [len(block) for block in blocks.blocks]})
    assert len(blocks.blocks) == 2
    host = RendezvousHost("127.0.0.1", 30.0)
    meeting = Rendezvous("127.0.0.1", host.port, "a", 3, 30.0)
    assert Rendezvous.from_json(meeting.to_json()) == meeting

    def worker(rank: int) -> tuple[Group, dict[str, torch.Tensor]]:
        group = join(meeting, rank, CPU)
        return group, dict(receive_tensors(group, layout, CPU))

    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(worker, rank) for rank in (1, 2)]
        group = join(meeting, 0, CPU, host.store)
        send_blocks(group, blocks.blocks)
        for future in workers:
            received = future.result()[1]
            assert set(received) == set(weights)
            for name, tensor in weights.items():
                assert torch.equal(received[name], tensor.bfloat16()), name


def test_who_does_not_come_ends_the_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "GATHER_SECONDS", 0.3)
    host = RendezvousHost("127.0.0.1", 0.5)
    meeting = Rendezvous("127.0.0.1", host.port, "b", 2, 0.5)
    with pytest.raises(RuntimeError, match=r"here/1|imeout"):
        join(meeting, 0, CPU, host.store)
