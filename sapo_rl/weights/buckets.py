"""Weights through a buffer that is smaller than they are: a half is read while the next tensors are put into the other.

The engines read all of it in one call, between two steps of decoding, so that none ever writes with weights of which
some are old. What they would need after a restart goes into files in shared memory beside it.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sapo_rl.weights.base import WeightTransport, gather_only, holding, make_room, settle
from sapo_rl.weights.buffer import aligned, view_of
from sapo_rl.weights.file import FileTransport
from sapo_rl.weights.memory import pin, unpin
from sapo_rl.weights.shared import SharedTransport

if TYPE_CHECKING:
    from sapo_rl.engines.base import LoadingEngine

POLL_SECONDS = 0.05
"""Between two looks whether an engine that says nothing is still there."""

Placed = tuple[str, list[int], int]
"""A tensor's name, its shape, and the byte of its bucket at which it starts."""


class BucketTransport(WeightTransport["LoadingEngine"]):
    """Streams the weights through two halves of a buffer.

    Args:
        memory: where the halves are, and what engines map them by.
        files: a folder for the socket by which engines tell what they have read, and for the copy.
        half: bytes of each half, enough for the largest tensor.
        keep: whether the copy is made, for engines that are restarted or woken up before the next push.
    """

    def __init__(self, memory: SharedTransport, files: FileTransport, half: int, keep: bool) -> None:
        self.dtype = memory.dtype
        self._memory, self._files, self._size = memory, files, half
        self._halves: list[torch.Tensor] = []
        self._copy = _Copy(files) if keep else None

    def push(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], engines: Sequence[LoadingEngine], version: int
    ) -> None:
        """See `WeightTransport.push`. Raises what an engine raised."""
        if not engines:  # another rank's engine has this device
            gather_only(named_tensors)
            return
        with ThreadPoolExecutor(len(engines)) as pool:
            with holding(engines):
                calls = self._stream(named_tensors, engines, version, pool)
            missed = [engine for engine, call in zip(engines, calls, strict=True) if not call.result()]
            again = self._copy.layout if self._copy else _NOTHING
            list(pool.map(lambda engine: engine.load_weights(again, version), missed))

    def close(self) -> None:
        """Free buffer and copy."""
        self._halves = []
        if self._copy is not None:
            self._copy.close()
        self._memory.close()
        self._files.close()

    def _stream(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        engines: Sequence[LoadingEngine],
        version: int,
        pool: ThreadPoolExecutor,
    ) -> list[Future[bool]]:
        """Bring the weights to all engines that last; return whether each did, known once it has loaded them."""
        make_room(engines)
        while len(self._halves) < 2:
            self._halves.append(self._memory.allocate(self._size))
        with _Readers(str(self._files.folder / "readers")) as readers:
            layouts = [self._layout(readers.address, number) for number in range(len(engines))]
            later = self._copy.layout if self._copy else None
            calls = [
                pool.submit(engine.stream_weights, layout, later, version)
                for engine, layout in zip(engines, layouts, strict=True)
            ]
            readers.meet(calls)
            for number, size, tensors in self._buckets(named_tensors, readers):
                settle()
                if self._copy is not None:
                    self._copy.take(number, self._halves[number % 2][:size], tensors)
                readers.tell(json.dumps({"half": number % 2, "tensors": tensors}).encode())
            if self._copy is not None:
                self._copy.finish()
            readers.wait_for_all()
            make_room(engines)  # they take the rest of their memory next
            readers.tell(b"")
        return calls

    def _buckets(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], readers: _Readers
    ) -> Iterator[tuple[int, int, list[Placed]]]:
        """Fill the halves by turns; yield each bucket's number, its bytes and what is in it."""
        number, used, placed = 0, 0, list[Placed]()
        for name, tensor in named_tensors:
            size = aligned(tensor.numel(), self.dtype)
            if size > self._size:
                raise ValueError(f"{name} takes {size} bytes, more than half a buffer has ({self._size})")
            if placed and used + size > self._size:
                yield number, used, placed
                number, used, placed = number + 1, 0, []
            if not placed and number >= 2:  # the half may be in use by the bucket before the last
                readers.wait_for(number - 1)
                if self._copy is not None:
                    self._copy.wait_for(number - 2)
            view_of(self._halves[number % 2], self.dtype, list(tensor.shape), used).copy_(tensor.detach())
            placed.append((name, list(tensor.shape), used))
            used += size
        if placed:
            yield number, used, placed

    def _layout(self, address: str, number: int) -> str:
        halves = list(zip(self._memory.handles(), map(len, self._halves), strict=True))
        dtype = str(self.dtype).removeprefix("torch.")
        found = {"kind": self._memory.kind, "dtype": dtype, "blocks": halves, "tensors": []}
        return json.dumps(found | {"readers": address, "number": number})


_NOTHING = json.dumps({"kind": "host", "dtype": "float32", "blocks": [], "tensors": []})


class _Readers:
    """The engines that read a stream; one that fails or dies is left out from then on.

    Args:
        address: path of the socket at which they report.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._listener = socket.socket(socket.AF_UNIX)
        self._lines: dict[int, Connection] = {}
        self._read: dict[int, int] = {}
        self._told = 0
        self._calls: Sequence[Future[bool]] = ()

    def __enter__(self) -> _Readers:
        self._listener.bind(self.address)
        self._listener.listen()
        self._listener.settimeout(POLL_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections, which ends the reading of those that have not been told the end."""
        for line in self._lines.values():
            line.close()
        self._listener.close()
        Path(self.address).unlink(missing_ok=True)

    def meet(self, calls: Sequence[Future[bool]]) -> None:
        """Wait until each of the engines that were called has connected, or its call has ended."""
        self._calls = calls
        while any(number not in self._lines and not call.done() for number, call in enumerate(calls)):
            with contextlib.suppress(TimeoutError):
                accepted, _ = self._listener.accept()
                line = Connection(accepted.detach())
                with contextlib.suppress(EOFError, OSError):
                    number = int(line.recv_bytes())
                    self._lines[number], self._read[number] = line, 0

    def tell(self, message: bytes) -> None:
        """Send a message to all."""
        self._told += 1
        for number, line in list(self._lines.items()):
            try:
                line.send_bytes(message)
            except OSError:
                self._leave_out(number)

    def wait_for(self, count: int) -> None:
        """Wait until all have read the first `count` buckets."""
        for number, line in list(self._lines.items()):
            try:
                while self._read[number] < count:
                    if line.poll(POLL_SECONDS):
                        line.recv_bytes()
                        self._read[number] += 1
                    elif self._calls[number].done():
                        raise EOFError
            except (EOFError, OSError):
                self._leave_out(number)

    def wait_for_all(self) -> None:
        """Wait until all have read all buckets."""
        self.wait_for(self._told)

    def _leave_out(self, number: int) -> None:
        self._lines.pop(number).close()


class _Copy:
    """A copy of all buckets in files that engines map."""

    def __init__(self, files: FileTransport) -> None:
        self.layout = json.dumps({"index": str(files.folder / "index.json")})
        self._files = files
        self._blocks: list[torch.Tensor] = []
        self._tensors: list[list[Placed]] = []
        self._pinned: list[bool] = []
        self._under_way: list[torch.cuda.Event | None] = []
        self._stream: torch.cuda.Stream | None = None

    def take(self, number: int, bucket: torch.Tensor, tensors: list[Placed]) -> None:
        """Begin to copy a bucket that has been filled."""
        if number == len(self._blocks):
            self._blocks.append(self._files.allocate(max(1, len(bucket))))
            self._tensors.append(tensors)
            self._under_way.append(None)
            self._pinned.append(bucket.is_cuda and pin(self._blocks[-1]))  # else the copy waits, and goes by detours
        block = self._blocks[number][: len(bucket)]
        if not bucket.is_cuda:
            block.copy_(bucket)
            return
        self._stream = self._stream or torch.cuda.Stream()
        with torch.cuda.stream(self._stream):
            block.copy_(bucket, non_blocking=True)
            self._under_way[number] = event = torch.cuda.Event()
            event.record()

    def wait_for(self, number: int) -> None:
        """Wait until the copy of a bucket is made."""
        if (event := self._under_way[number]) is not None:
            event.synchronize()

    def finish(self) -> None:
        """Wait for all; describe them, the first time."""
        for number in range(len(self._blocks)):
            self.wait_for(number)
        index, dtype = self._files.folder / "index.json", str(self._files.dtype).removeprefix("torch.")
        if not index.exists():
            blocks = list(zip(self._files.handles(), map(len, self._blocks), strict=True))
            tensors = [(name, shape, block, at) for block, some in enumerate(self._tensors) for name, shape, at in some]
            index.write_text(json.dumps({"kind": "host", "dtype": dtype, "blocks": blocks, "tensors": tensors}))

    def close(self) -> None:
        """Let go of the memory, before the files are deleted."""
        for block, pinned in zip(self._blocks, self._pinned, strict=True):
            if pinned:
                unpin(block)
        self._blocks, self._pinned, self._under_way = [], [], []


def read_buckets(
    layout: str, halves: Sequence[torch.Tensor], settle: Callable[[], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield copies of the tensors of a stream by name, in memory of their own, as they arrive.

    Args:
        layout: what `BucketTransport` gave to `LoadingEngine.stream_weights`.
        halves: the memory that it describes.
        settle: waits until what was asked of the device is done.

    Raises:
        EOFError: the trainer gave up.
    """
    found: dict[str, Any] = json.loads(layout)
    dtype = getattr(torch, found["dtype"])
    with socket.socket(socket.AF_UNIX) as own:
        own.connect(found["readers"])
        with Connection(own.detach()) as line:
            try:
                line.send_bytes(str(found["number"]).encode())
                while message := line.recv_bytes():
                    bucket = json.loads(message)
                    for name, shape, start in bucket["tensors"]:
                        yield name, view_of(halves[bucket["half"]], dtype, shape, start).clone()
                    settle()
                    line.send_bytes(b"read")
            except (EOFError, OSError) as error:
                raise EOFError("the trainer gave up bringing its weights") from error
