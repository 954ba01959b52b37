"""Weights over the network, to rollout servers on other GPUs and hosts: NCCL between GPUs, gloo on the CPU.

Rank 0 keeps one copy of the weights in the engines' dtype until the next push. From it a server that was restarted gets
exactly the version that the others have, whatever the trainer does meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

import torch

from sapo_rl.errors import EngineError, EngineLost, UserError
from sapo_rl.processes import at_once
from sapo_rl.weights.base import WeightTransport, gather_only
from sapo_rl.weights.buffer import WeightBlocks
from sapo_rl.weights.rendezvous import Group, Rendezvous, RendezvousHost, join, send_blocks

if TYPE_CHECKING:
    from sapo_rl.engines.remote import RemoteEngine

logger = logging.getLogger(__name__)

WATCH_SECONDS = 1.0


class NcclTransport(WeightTransport["RemoteEngine"]):
    """Broadcasts to each server in a group of its own, and takes back servers that return, between pushes too.

    All ranks push together; rank 0 alone sends, once to each server.

    Args:
        dtype: the engines'.
        device: where rank 0 keeps its copy: `cpu`, or `cuda:<index>`.
        run: tells the weights of this run, and the part of it since a resume, from all others; the same on all ranks.
        sends: whether this is rank 0.
        seconds: limit on each broadcast.
    """

    def __init__(self, dtype: torch.dtype, device: str, run: str, sends: bool, seconds: float) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self.run = run
        self.sends = sends
        self.seconds = seconds
        self._blocks = WeightBlocks(dtype, lambda size: torch.empty(size, dtype=torch.uint8, device=self.device))
        self._layout = ""
        self._hosts: dict[str, RendezvousHost] = {}
        self._groups: dict[RemoteEngine, tuple[Rendezvous, Group]] = {}
        self._meetings = 0
        self._lock = threading.Lock()
        self._watch: threading.Thread | None = None
        self._closed = threading.Event()

    def push(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], engines: Sequence[RemoteEngine], version: int
    ) -> None:
        """See `WeightTransport.push`. A server that does not answer gets the weights when it returns.

        Servers go on with what they write; the weights are asked of them once all that answer have them.

        Raises:
            EngineError: a server refused the weights.
            UserError: a server computes on another kind of device.
        """
        weight_id = f"{self.run}/{version}"
        _wait_for_all_ranks()  # where batches keep to one version, their rollouts are over
        with self._lock:
            if self.sends:
                self._fill(named_tensors)
                together = [engine for engine in engines if self._manage(self._meet, engine)]
                send = partial(self._send, weight_id=weight_id)
                at_once([partial(self._manage, send, engine) for engine in together])
            else:
                gather_only(named_tensors)
            _wait_for_all_ranks()
            for engine in engines:
                engine.expect(weight_id, version)
        if self.sends and self._watch is None:
            self._watch = threading.Thread(target=self._take_back, args=(engines,), name="servers", daemon=True)
            self._watch.start()

    def close(self) -> None:
        """Leave the groups, let the servers work for others, and free the copy."""
        self._closed.set()
        if self._watch is not None:
            self._watch.join()
        for engine, (_, group) in self._groups.items():
            group.abort()
            with contextlib.suppress(EngineLost):
                engine.leave()
        self._groups.clear()
        self._hosts.clear()
        self._blocks.free()

    def _fill(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._blocks.fill(named_tensors)
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self._layout = json.dumps(self._blocks.layout() | {"blocks": [len(block) for block in self._blocks.blocks]})

    def _manage(self, act: Callable[[RemoteEngine], None], engine: RemoteEngine) -> bool:
        """Return whether the server was there for it."""
        try:
            act(engine)
        except EngineLost as lost:
            engine.tell(f"{lost}; it gets the weights when it returns")
            return False
        return True

    def _meet(self, engine: RemoteEngine) -> None:
        """Come together with the workers of a server, unless it is still in the group of an earlier push."""
        info = engine.info()
        if engine in self._groups and info["meeting"] == self._groups[engine][0].name:
            return
        if info["device"] != self.device.type:
            raise UserError(
                f"rollout.servers: {engine.settings.address} computes on {info['device']}, the trainer on "
                f"{self.device.type}; weights go from GPU to GPU, or from CPU to CPU"
            )
        address = engine.own_address()
        if address not in self._hosts:
            self._hosts[address] = RendezvousHost(address, self.seconds)
        host = self._hosts[address]
        self._meetings += 1
        name = f"{self.run}/{self._meetings}"
        meeting = Rendezvous(address, host.port, name, 1 + info["workers"], self.seconds)
        joining = _in_thread(lambda: engine.join(meeting))
        try:
            group = join(
                meeting, 0, self.device, host.store, lambda: joining.done() and joining.exception() is not None
            )
        except RuntimeError as error:
            joining.result()  # says more, where the server refused
            raise EngineLost(f"{engine} did not join the group ({error})") from error
        joining.result()
        self._groups[engine] = meeting, group

    def _send(self, engine: RemoteEngine, weight_id: str) -> None:
        """Bring the copy, which has this weight_id, into a server that is in a group."""
        meeting, group = self._groups[engine]

        def stop(loading: Future[None]) -> None:
            if loading.exception() is not None:
                group.abort()  # NCCL would wait for ever for a server that has died

        loading = _in_thread(lambda: engine.load(meeting, self._layout, weight_id))
        loading.add_done_callback(stop)
        try:
            send_blocks(group, self._blocks.blocks)
            loading.result()
        except (RuntimeError, EngineLost) as error:
            del self._groups[engine]
            loading.result()  # says more than the group does
            raise EngineLost(f"{engine} did not take the weights ({error})") from error

    def _take_back(self, engines: Sequence[RemoteEngine]) -> None:
        """Bring the weights to servers that answer and have others: they were started anew, or out of reach."""
        watched = list(engines)
        while not self._closed.wait(WATCH_SECONDS):
            for engine in watched:
                try:
                    with self._lock:
                        if engine.info()["weight_id"] == engine.weight_id:
                            continue
                        self._meet(engine)
                        self._send(engine, engine.weight_id)
                except EngineLost:
                    continue
                except (EngineError, UserError) as error:
                    logger.warning("%s is left out from now on: %s", engine, error)
                    watched.remove(engine)
                    break
                engine.restarts += 1
                logger.warning("%s is back, with the weights of version %d", engine, engine.weight_version)


def _in_thread(call: Callable[[], None]) -> Future[None]:
    """Run `call` in a thread that does not keep the process alive."""
    result: Future[None] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, name="server-call", daemon=True).start()
    return result


def _wait_for_all_ranks() -> None:
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()
