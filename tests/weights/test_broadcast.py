"""Weights through a real process group; gloo takes NCCL's place on the CPU."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from waiting import until

from sapo_rl.errors import EngineLost
from sapo_rl.weights import broadcast
from sapo_rl.weights import rendezvous as group_module
from sapo_rl.weights.broadcast import NcclTransport
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
    with pytest.raises(RuntimeError, match="here/1"):
        join(meeting, 0, CPU, host.store)


def test_who_refuses_to_come_ends_the_meeting_at_once() -> None:
    host, asked = RendezvousHost("127.0.0.1", 30.0), iter([False, False, True])
    with pytest.raises(RuntimeError, match="here/1"):
        join(Rendezvous("127.0.0.1", host.port, "c", 2, 30.0), 0, CPU, host.store, lambda: next(asked))


@dataclass(eq=False)
class Server:
    """A rollout server's part: it joins, and receives into `tensors`."""

    weight_id: str = ""
    held: str | None = None
    group: Group | None = None
    meeting: str | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    expected_at_load: list[str] = field(default_factory=list)
    restarts: int = 0
    weight_version: int = 0
    away: bool = False

    def info(self) -> dict[str, Any]:
        if self.away:
            raise EngineLost("away")
        return {"device": "cpu", "workers": 1, "meeting": self.meeting, "weight_id": self.held}

    def own_address(self) -> str:
        return "127.0.0.1"

    def join(self, meeting: Rendezvous) -> None:
        self.group, self.meeting = join(meeting, 1, CPU), meeting.name

    def load(self, meeting: Rendezvous, layout: str, weight_id: str) -> None:
        assert self.group is not None and self.meeting == meeting.name
        self.expected_at_load.append(self.weight_id)
        self.tensors = dict(receive_tensors(self.group, layout, CPU))
        self.held = weight_id

    def expect(self, weight_id: str, version: int) -> None:
        self.weight_id, self.weight_version = weight_id, version

    def tell(self, trouble: str) -> None:
        pass

    def leave(self) -> None:
        pass


def test_weights_are_expected_of_a_server_once_all_that_answer_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "WATCH_SECONDS", 0.01)
    servers: Any = [Server(), Server(), Server(away=True)]
    transport = NcclTransport(torch.float32, "cpu", "run", sends=True, seconds=30.0)
    for version in (1, 2):
        transport.push({"w": torch.full((3,), float(version))}.items(), servers, version)
        assert [server.weight_id for server in servers] == [f"run/{version}"] * 3
        for server in servers[:2]:
            assert (server.held, server.weight_version) == (f"run/{version}", version)
            assert server.tensors["w"].tolist() == [version] * 3
    assert servers[0].expected_at_load == servers[1].expected_at_load == ["", "run/1"]
    servers[2].away = False
    until(lambda: servers[2].restarts)  # gets the same, between two pushes
    assert servers[2].held == "run/2" and servers[2].tensors["w"].tolist() == [2.0] * 3
    assert [server.restarts for server in servers] == [0, 0, 1]
    transport.close()
