"""How the ranks of a run meet, part, and tell of an error once. One process is a world of its own."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch.distributed import DistError, PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.rendezvous.api import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.rendezvous import rendezvous

from sapo_rl import run_folder
from sapo_rl.config import Config
from sapo_rl.errors import EngineError, SharedError, UserError, program
from sapo_rl.run.launch import LOOPBACK, PEER_LOST
from sapo_rl.weights.rendezvous import RendezvousHost

RENDEZVOUS_SECONDS = 600.0
"""Seconds that ranks wait for the first, which may have to compose the config."""
ERROR_GRACE_SECONDS = 3.0
"""Seconds in which a rank's error is taken for that of all ranks, which the first rank of the machine tells."""
SHARED_ERROR_GRACE_SECONDS = 30.0
"""Seconds that other ranks stay silent about an error that every rank has (SharedError), so that rank 0 can shut down
and print the message once."""
INTERFACE = "lo"
"""The network interface that only this machine's processes reach."""
ADDRESS = "127.0.0.1"
"""Its address."""
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "gloo")
"""What gloo says where a peer is gone or does not answer."""


def register_rendezvous() -> None:
    """Make the rendezvous of one machine known to torch's launcher in this process."""
    rendezvous_handler_registry.register(LOOPBACK, LoopbackRendezvous)


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of a single launcher; torch's own listens on all interfaces, whatever address it is given.

    The store asks for no key: whoever reaches it reads and writes what the ranks tell each other.
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._host = RendezvousHost(ADDRESS, int(parameters.config["timeout"]))

    def get_backend(self) -> str:
        """Return the backend's name."""
        return LOOPBACK

    @property
    def use_agent_store(self) -> bool:
        """Whether ranks are clients of the launcher's store: always."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the store, for one launcher alone."""
        where = RendezvousStoreInfo(ADDRESS, self._host.port)
        return RendezvousInfo(PrefixStore(self._run_id, self._host.store), 0, 1, where)

    def is_closed(self) -> bool:
        """Whether no further rendezvous is possible: never."""
        return False

    def set_closed(self) -> None:
        """Do nothing: ranks are not started again."""

    def num_nodes_waiting(self) -> int:
        """Return how many more launchers want to join: none."""
        return 0

    def get_run_id(self) -> str:
        """Return the id that the launcher was given."""
        return self._run_id

    def shutdown(self) -> bool:
        """End with the process."""
        return True


def size() -> int:
    """Return how many processes the launcher started, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def share(folder: Path | None) -> tuple[Path, str, str]:
    """Return the run folder, its frozen config and a token on every rank; only rank 0 need know or see the folder.

    The token is random and names this process of the run to rollout servers. On a machine that does not see the folder,
    one of the same name is made for logs.
    """
    if size() == 1:
        assert folder is not None
        return folder, (folder / run_folder.CONFIG).read_text(encoding="utf-8"), secrets.token_hex(8)
    _choose_interface()
    store, rank, _ = next(rendezvous("env://", timeout=datetime.timedelta(seconds=RENDEZVOUS_SECONDS)))
    store = PrefixStore("sapo", store)  # text, before there is a process group: nothing is unpickled
    if rank == 0:
        assert folder is not None
        frozen = (folder / run_folder.CONFIG).read_text(encoding="utf-8")
        store.set("run", json.dumps([str(folder), frozen, secrets.token_hex(8)]))
    name, frozen, token = json.loads(store.get("run"))
    folder = Path(name)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder, frozen, token


def _choose_interface() -> None:
    """Have gloo listen where the main process is reached: it would take the address of the host's name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address == own for address in addresses):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


@contextlib.contextmanager
def join(config: Config, folder: Path) -> Iterator[Accelerator]:
    """Connect the ranks; at the end of the block, where it is not an error, they wait for each other.

    Raises:
        UserError: there are not as many ranks as were asked for, or checkpoints need a folder that all machines see.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME") == INTERFACE and not config.rollout.servers:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", INTERFACE)  # servers may be on other machines
    limit = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=config.launch.timeout))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[limit])
    found, asked = accelerator.num_processes, config.launch.num_processes
    if not found == size() == asked:
        raise UserError(
            f"launch.num_processes: is {asked}, but the launcher started {size()} process(es), of which {found} are "
            f"connected; start as many (accelerate launch --num_processes, torchrun --nproc_per_node), or set it"
        )
    seen: list[bool] = gather_object([(folder / run_folder.CONFIG).is_file()])
    if config.checkpoint.every and not all(seen):
        raise UserError(
            f"checkpoint.every: '{folder}' is not on a disk that all machines share (rank {seen.index(False)} does not "
            "see it), and checkpoints need one; start the run in a shared folder, or set checkpoint.every=0"
        )
    yield accelerator
    _leave(accelerator)


def _leave(accelerator: Accelerator) -> None:
    """End this rank's part in the process group.

    The destructor of a gloo group holds the interpreter's lock while it joins a thread that may still need that lock to
    free the last collective's tensors (torch 2.13); the pause lets it, or the process would hang for good.
    """
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, where another rank is first to exit with 130
        time.sleep(0.2)
    accelerator.end_training()


def fail(error: Exception) -> NoReturn:
    """Tell of an error and end this rank: 2 for a user's mistake, else 1, or `PEER_LOST` where another rank is gone.

    What all ranks found is told once, by the first of each machine: it ends the others before they speak.
    """
    if size() == 1:
        if isinstance(error, UserError):
            print(f"{program()}: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        raise error
    rank, name = os.environ["RANK"], ""
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        name = f"rank {rank}: "
        if isinstance(error, UserError):
            time.sleep(SHARED_ERROR_GRACE_SECONDS if isinstance(error, SharedError) else ERROR_GRACE_SECONDS)
    if isinstance(error, UserError):
        print(f"{program()}: {name}{error}", file=sys.stderr)
        code = 2
    elif _is_lost(error):
        print(f"{program()}: rank {rank} lost another rank: {_reason(error)}", file=sys.stderr)
        code = PEER_LOST
    else:
        print(f"rank {rank}:\n{''.join(traceback.format_exception(error))}", file=sys.stderr)
        code = 1
    quit_now(code)


def _is_lost(error: Exception) -> bool:
    if isinstance(error, EngineError):  # which may quote anything
        return False
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and any(x in str(error) for x in LOST))


def _reason(error: Exception) -> str:
    """The first sentence of an error out of torch's C++ parts, without the source line in front."""
    return re.split(r"\. |\n", re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip()))[0]


def quit_now(code: int) -> NoReturn:
    """Exit without the process group's destructor, which waits for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
