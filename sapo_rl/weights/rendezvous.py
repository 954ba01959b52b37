"""A process group of the trainer and the workers of one server, apart from every other group of both.

One group a server: a server that dies, or comes back, leaves the others alone. What is exchanged to find each other are
addresses, over a TCP store of torch on the trainer's side; the weights follow by NCCL, or gloo on the CPU.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from sapo_rl.weights.buffer import view_of


class Group(Protocol):
    """What is used of torch's process groups."""

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.distributed.Work:
        """Send the tensor from rank `root` to the others; `wait` waits, or on a GPU has the current stream wait."""
        ...

    def abort(self) -> None:
        """Give up what is under way; the group is of no more use."""
        ...


GATHER_SECONDS = 60.0
"""In which all ranks must have come."""


@dataclass(frozen=True)
class Rendezvous:
    """Where and how a group comes together.

    Example:
        >>> Rendezvous("10.0.0.1", 29501, "run/1", size=2, seconds=60.0)  # the trainer and one worker
    """

    host: str
    """The trainer's address, as the server sees it."""
    port: int
    name: str
    """Keeps this group apart from others at the same address."""
    size: int
    """The trainer and the server's workers."""
    seconds: float
    """Limit on each broadcast."""

    def to_json(self) -> str:
        """Return the meeting as text for `Rendezvous.from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Rendezvous:
        """Return the meeting that `to_json` wrote."""
        return cls(**json.loads(text))


class RendezvousHost:
    """The trainer's side: a store that listens on one address of this machine.

    Args:
        address: the trainer's address towards the servers; empty for all.
        seconds: limit on each answer of the store.
    """

    def __init__(self, address: str, seconds: float) -> None:
        listener = socket.create_server((address, 0))
        self.port: int = listener.getsockname()[1]
        self.store = TCPStore(
            address or "127.0.0.1",
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=seconds),
            master_listen_fd=listener.detach(),
        )


def join(
    meeting: Rendezvous,
    rank: int,
    device: torch.device,
    store: Store | None = None,
    refused: Callable[[], bool] = lambda: False,
) -> Group:
    """Come together and return the group, once all ranks are connected.

    Args:
        meeting: the same for all ranks.
        rank: 0 on the trainer.
        device: where this rank's tensors are; a GPU for all ranks, or the CPU for all.
        store: the host's own, on rank 0.
        refused: tells rank 0 whether it waits for the others in vain.

    Raises:
        RuntimeError: not all came, one has refused to, or they cannot be connected.
    """
    limit = timedelta(seconds=meeting.seconds)
    if store is None:
        store = TCPStore(meeting.host, meeting.port, is_master=False, timeout=limit)
    own = PrefixStore(meeting.name, store)
    if rank == 0:  # connecting has no limit of its own in NCCL: see first that nobody is missing
        _gather(own, [f"here/{other}" for other in range(1, meeting.size)], refused)
    else:
        own.set(f"here/{rank}", "")
    if device.type == "cuda":
        group = _nccl(own, rank, meeting.size, limit)
    else:
        address = meeting.host if rank == 0 else address_towards(meeting.host, meeting.port)
        group = _gloo(own, rank, meeting.size, limit, address)
    group.broadcast(torch.zeros(1, device=device), 0).wait()  # NCCL connects at the first call
    return group


def _gather(store: Store, others: list[str], refused: Callable[[], bool]) -> None:
    deadline = time.monotonic() + GATHER_SECONDS
    while not store.check(others):
        if refused() or time.monotonic() > deadline:
            raise RuntimeError(f"not all have come of {', '.join(others)}")
        time.sleep(0.01)


def _nccl(store: Store, rank: int, size: int, limit: timedelta) -> Group:
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = limit
    group: Any = ProcessGroupNCCL(store, rank, size, options)
    return group


def _gloo(store: Store, rank: int, size: int, limit: timedelta, address: str) -> Group:
    """Gloo would take the address that the host's name resolves to, which may be another network's, or none."""
    from torch.distributed import ProcessGroupGloo

    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = limit
    group: Any = ProcessGroupGloo(store, rank, size, options)
    return group


def address_towards(host: str, port: int) -> str:
    """Return this machine's address on the way to another.

    Raises:
        OSError: there is no connection.
    """
    with socket.create_connection((host, port), timeout=10) as connection:
        return connection.getsockname()[0]


def send_blocks(group: Group, blocks: list[torch.Tensor]) -> None:
    """Broadcast (size,) uint8 tensors from rank 0; on a GPU, put the broadcasts into the current stream."""
    for block in blocks:
        group.broadcast(block, 0).wait()


def receive_tensors(group: Group, layout: str, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors by name, block by block as they arrive.

    Args:
        group: this process and the sender of the blocks.
        layout: JSON of `WeightBlocks.layout` and, as `blocks`, the sizes.
        device: where they are received.
    """
    found = json.loads(layout)
    dtype = getattr(torch, found["dtype"])
    held: list[list[tuple[str, list[int], int]]] = [[] for _ in found["blocks"]]
    for name, shape, block, start in found["tensors"]:
        held[block].append((name, shape, start))
    for size, tensors in zip(found["blocks"], held, strict=True):
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        group.broadcast(memory, 0).wait()
        for name, shape, start in tensors:
            yield name, view_of(memory, dtype, shape, start)
