"""An engine that runs as a server of its own (`sapo-serve`), on this machine or another."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from sapo_rl.engines.base import Completion, IndexedRequest, Request, Sampling
from sapo_rl.engines.key import VARIABLE
from sapo_rl.engines.vllm.api import DEAD, NOT_THOSE_WEIGHTS, WRONG_KEY, run_of
from sapo_rl.errors import EngineError, EngineLost, UserError
from sapo_rl.weights.rendezvous import Rendezvous, address_towards

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
QUIET_SECONDS = 15.0
"""Without an answer for so long, a server is asked whether it is still there: a machine that lost its power says
nothing of it."""


@dataclass(frozen=True)
class RemoteSettings:
    """What the trainer asks of a server; the fields not explained are those of `RolloutConfig` and `ModelConfig`."""

    address: str
    """host:port"""
    key: str
    dtype: str
    max_model_len: int
    """Prompt and completion tokens together, at least."""
    stop_token_ids: list[int]
    """Every token that ends a sequence."""
    start_timeout: float
    timeout: float


class RemoteEngine:
    """An `Engine` over HTTP. It takes only completions by the weights last expected (`expect`).

    A server that does not answer, or holds other weights, raises EngineLost from the call at hand; the next call tries
    it again. Bringing weights to it is the transport's business.
    """

    def __init__(self, settings: RemoteSettings) -> None:
        self.settings = settings
        self.weight_version = 0
        self.restarts = 0
        self.asleep = False
        self.weight_id = ""
        self._told = False
        self._url = f"http://{settings.address}/sapo/"
        self._common: dict[str, Any] = {
            "headers": {"Authorization": f"Bearer {settings.key}"},
            "trust_env": False,  # proxies are for the world outside: neither the key nor the tokens should go there
            "verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),  # not used, and the default one takes long to make
        }
        self._client = httpx.Client(**self._common)

    def __str__(self) -> str:
        return f"rollout server {self.settings.address}"

    def start(self) -> None:
        """Do nothing: servers are started with `sapo-serve`."""

    def wait_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            UserError: it does not within `settings.start_timeout`, or serves another model, or wants another key.
        """
        deadline = time.monotonic() + self.settings.start_timeout
        while True:
            try:
                info = self.info()
                break
            except EngineLost as lost:
                if time.monotonic() > deadline:
                    raise UserError(f"rollout.servers: {lost}; start it with: sapo-serve config=...") from lost
                self.tell(f"waiting for {self}")
            time.sleep(1.0)
        self._told = False
        if info["dtype"] != self.settings.dtype:
            raise UserError(
                f"rollout.servers: {self.settings.address} computes in {info['dtype']}, model.dtype is "
                f"{self.settings.dtype}; give sapo-serve the same recipe"
            )
        if info["max_model_len"] < self.settings.max_model_len:
            raise UserError(
                f"rollout.servers: {self.settings.address} takes {info['max_model_len']} tokens, the run needs "
                f"{self.settings.max_model_len}; give sapo-serve the same recipe"
            )

    def info(self) -> dict[str, Any]:
        """Return what `TrainerApi.info` says. Raises EngineLost where the server does not answer."""
        return self._call("info", {"run": run_of(self.weight_id)}, QUIET_SECONDS)

    def expect(self, weight_id: str, version: int) -> None:
        """Take completions only from the weights of this weight_id from now on, which are the trainer's `version`."""
        self.weight_id, self.weight_version = weight_id, version

    def join(self, meeting: Rendezvous) -> None:
        """Have the server's workers meet this process, which calls `weights.rendezvous.join` meanwhile."""
        self._call("join", {"name": meeting.name, "meeting": meeting.to_json()}, meeting.seconds)

    def load(self, meeting: Rendezvous, layout: str) -> None:
        """Have the server receive the weights that are expected of it, from the group that it joined."""
        body = {"meeting": meeting.name, "weight_id": self.weight_id, "layout": layout}
        self._call("load", body, self.settings.timeout)

    def leave(self) -> None:
        """Let the server work for other runs. Raises EngineLost where it does not answer."""
        self._call("leave", {"run": run_of(self.weight_id)}, QUIET_SECONDS)

    def tell(self, trouble: str) -> None:
        """Log what keeps the server away, once until it is back."""
        if not self._told:
            logger.warning("%s", trouble)
        self._told = True

    def own_address(self) -> str:
        """Return this machine's address as the server sees it. Raises EngineLost."""
        host, _, port = self.settings.address.rpartition(":")
        try:
            return address_towards(host, int(port))
        except OSError as error:
            raise EngineLost(f"{self} does not answer ({error})") from error

    def stream(
        self, take: Callable[[], IndexedRequest | None], window: int, sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See `Engine.stream`. Raises EngineError where the server refuses a request."""
        waiting: dict[int, Request] = {}
        try:
            self._check()
            yield from self._answers(take, window, sampling, waiting)
        except EngineLost as lost:
            self.tell(f"{lost}; its {len(waiting)} unanswered requests wait for another server or its return")
            raise EngineLost(str(lost), list(waiting.items())) from lost

    def score(self, token_ids: list[int]) -> list[float]:
        """See `Engine.score`."""
        body = {"weight_id": self.weight_id, "token_ids": token_ids}
        return self._call("score", body, self.settings.timeout)["logps"]

    def sleep(self) -> None:
        """Do nothing: the trainer does not want the server's memory."""

    def close(self) -> None:
        """Do nothing: the server goes on for the next run."""

    def _check(self) -> None:
        """Raise EngineLost where the server cannot give what `expect` asks for."""
        if (found := self.info()["weight_id"]) != self.weight_id:
            raise EngineLost(f"{self} does not have the current weights yet (it has {found})")
        self._told = False

    def _answers(
        self, take: Callable[[], IndexedRequest | None], window: int, sampling: Sampling, waiting: dict[int, Request]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Keep `window` completions under way; `waiting` holds their requests."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(self.settings.timeout, connect=CONNECT_SECONDS)
        with asyncio.Runner() as runner:
            client = httpx.AsyncClient(**self._common, limits=limits, timeout=timeout)
            tasks: dict[asyncio.Task[list[Completion]], int] = {}
            try:
                while True:
                    while sum(one.n for one in waiting.values()) < window and (taken := take()) is not None:
                        waiting[taken[0]] = taken[1]
                        call = self._complete(client, taken[1], sampling)
                        tasks[runner.get_loop().create_task(call)] = taken[0]
                    if not tasks:
                        return
                    done, _ = runner.run(
                        asyncio.wait(tasks, timeout=QUIET_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                    )
                    if not done:
                        self._check()
                    for task in done:
                        number, completions = tasks.pop(task), task.result()
                        del waiting[number]
                        yield number, completions
            finally:
                runner.run(_end(client, list(tasks)))

    async def _complete(self, client: httpx.AsyncClient, request: Request, sampling: Sampling) -> list[Completion]:
        body = {
            "weight_id": self.weight_id,
            "token_ids": request.token_ids,
            "n": request.n,
            "seed": request.seed,
            "sampling": asdict(sampling),
            "stop_token_ids": self.settings.stop_token_ids,
        }
        with self._telling():
            answer = self._read(await client.post(self._url + "generate", json=body))
        return [Completion(**one) for one in answer["completions"]]

    def _call(self, method: str, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
        with self._telling():
            return self._read(self._client.post(self._url + method, json=body, timeout=timeout))

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Word what the network raises."""
        try:
            yield
        except httpx.TransportError as error:
            raise EngineLost(f"{self} does not answer ({type(error).__name__}: {error})") from error

    def _read(self, response: httpx.Response) -> dict[str, Any]:
        """Return the answer.

        Raises:
            UserError: the key is wrong, or this is no `sapo-serve`.
            EngineLost: the server holds other weights, or is about to end.
            EngineError: it refused the call.
        """
        if response.status_code == WRONG_KEY:
            raise UserError(f"rollout.servers: {self.settings.address} refuses the API key; see {VARIABLE}")
        if response.status_code == 404:
            raise UserError(f"rollout.servers: {self.settings.address} was not started by sapo-serve")
        try:
            answer: dict[str, Any] = response.json()
        except ValueError as error:
            raise EngineLost(f"{self} answers {response.status_code}: {response.text[:200]}") from error
        if response.status_code in (DEAD, NOT_THOSE_WEIGHTS):
            raise EngineLost(f"{self} {answer['error']}")
        if response.status_code != 200:
            raise EngineError(f"{self} refused the call:\n{answer['error']}")
        return answer


async def _end(client: httpx.AsyncClient, tasks: list[asyncio.Task[list[Completion]]]) -> None:
    """Give up what is under way: the server stops it when the connection is closed."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()
