"""An engine that runs as a server of its own (`sapo-serve`), on this machine or another."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import httpx

from sapo_rl.engines.base import Completion, Request, Sampling, failed
from sapo_rl.engines.key import VARIABLE
from sapo_rl.engines.vllm.api import DEAD, NOT_THOSE_WEIGHTS, WRONG_KEY
from sapo_rl.engines.vllm.held import run_of, serves
from sapo_rl.errors import EngineError, EngineLost, UserError
from sapo_rl.weights.rendezvous import Rendezvous, address_towards

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONNECT_SECONDS = 5.0
KEEP_SECONDS = 2.0
"""An idle connection is used again; the server closes it after 5 s, perhaps just then."""
QUIET_SECONDS = 15.0
"""Without an answer for so long, a server is asked whether it is still there: a machine that lost its power says
nothing of it."""

ANSWER_BYTES, TOKEN_BYTES = 2**20, 64
"""What an answer may have, and as much again for each token that it is about: its number and log-probability as JSON
take half of that."""


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
    """An `Engine` over HTTP. It takes only completions begun by the weights last expected (`expect`) or newer.

    A server that does not answer, or has older weights or another run's, fails the call at hand with EngineLost; the
    next call tries it again. Bringing weights to it is the transport's business.
    """

    def __init__(self, settings: RemoteSettings) -> None:
        self.settings = settings
        self.weight_version = 0
        self.restarts = 0
        self.asleep = False
        self.weight_id = ""
        self._told = False
        self._url = f"http://{settings.address}/sapo/"
        common: dict[str, Any] = {
            "headers": {"Authorization": f"Bearer {settings.key}"},
            "trust_env": False,  # proxies are for the world outside: neither the key nor the tokens should go there
            "verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),  # not used, and the default one takes long to make
        }
        self._client = httpx.Client(**common)
        # As many connections as requests under way, which the dispatcher bounds.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_SECONDS)
        timeout = httpx.Timeout(settings.timeout, connect=CONNECT_SECONDS)
        self._posts = _Posts(httpx.AsyncClient(**common, limits=limits, timeout=timeout), self._check)

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
        """Ask only for completions by the weights of this weight_id, or newer, which are the trainer's `version`."""
        self.weight_id, self.weight_version = weight_id, version

    def join(self, meeting: Rendezvous) -> None:
        """Have the server's workers meet this process, which calls `weights.rendezvous.join` meanwhile."""
        self._call("join", {"name": meeting.name, "meeting": meeting.to_json()}, meeting.seconds)

    def load(self, meeting: Rendezvous, layout: str, weight_id: str) -> None:
        """Have the server receive weights from the group that it joined; what it writes goes on meanwhile."""
        body = {"meeting": meeting.name, "weight_id": weight_id, "layout": layout}
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

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> list[Future[list[Completion]]]:
        """See `Engine.submit`. What the server refuses fails its future with EngineError."""
        return [self._posts.begin(self._complete(request, sampling)) for request in requests]

    def recover(self) -> None:
        """See `Engine.recover`: the server answers and has the weights that are expected of it."""
        self._check()
        self._told = False

    def score(self, token_ids: list[int]) -> list[float]:
        """See `Engine.score`."""
        body = {"weight_id": self.weight_id, "token_ids": token_ids}
        return self._call("score", body, self.settings.timeout, len(token_ids))["logps"]

    def sleep(self) -> None:
        """Do nothing: the trainer does not want the server's memory."""

    def close(self) -> None:
        """Give up what is under way; the server goes on for the next run."""
        self._posts.close()

    def _check(self) -> None:
        """Raise EngineLost where the server cannot give what `expect` asks for."""
        if not serves(found := self.info()["weight_id"], self.weight_id):
            raise EngineLost(f"{self} does not have the current weights yet (it has {found})")

    async def _complete(self, request: Request, sampling: Sampling) -> list[Completion]:
        body = {
            "weight_id": self.weight_id,
            "token_ids": request.token_ids,
            "n": request.n,
            "seed": request.seed,
            "sampling": asdict(sampling),
            "stop_token_ids": self.settings.stop_token_ids,
        }
        try:
            with self._telling():
                most = ANSWER_BYTES + TOKEN_BYTES * request.n * sampling.max_tokens
                answer = self._read(await self._posts.post(self._url + "generate", body, most))
        except EngineLost as lost:
            self.tell(f"{lost}; what it has not answered waits for another server or its return")
            raise
        return [Completion(**one) for one in answer["completions"]]

    def _call(self, method: str, body: dict[str, Any], seconds: float, tokens: int = 0) -> dict[str, Any]:
        timeout, said = httpx.Timeout(seconds, connect=CONNECT_SECONDS), _Said(ANSWER_BYTES + TOKEN_BYTES * tokens)
        with self._telling(), self._client.stream("POST", self._url + method, json=body, timeout=timeout) as response:
            for part in response.iter_bytes():
                said.add(part)
        return self._read(said.answer(response))

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


class _Said:
    """What a server has answered so far, of at most so many bytes."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, bytearray()

    def add(self, part: bytes) -> None:
        """Take more of it. Raises EngineError where it is too long."""
        self._bytes += part
        if len(self._bytes) > self._most:
            raise EngineError(f"a rollout server answers with more than {self._most:,} bytes; is it a sapo-serve?")

    def answer(self, response: httpx.Response) -> httpx.Response:
        """Return the response with all that was taken."""
        return httpx.Response(response.status_code, content=bytes(self._bytes))


class _Posts:
    """Requests under way to one server, in a loop of their own, for as long as the engine lives.

    Args:
        client: sends them.
        check: asked in a thread of its own where the server has been quiet for `QUIET_SECONDS`; where it raises
            EngineLost, all that is under way is given up.
    """

    def __init__(self, client: httpx.AsyncClient, check: Callable[[], None]) -> None:
        self._client, self._check = client, check
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.Future[httpx.Response]] = set()
        self._heard = 0.0
        self._lost = ""
        self._watch: asyncio.Task[None] | None = None
        self._closed = False
        threading.Thread(target=self._loop.run_forever, name="server-requests", daemon=True).start()

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine that calls `post`; from any thread. To cancel it closes its connection: the server stops."""
        if self._closed:
            work.close()
            return failed(EngineError("the engine is closed"))
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def post(self, url: str, body: dict[str, Any], most: int) -> httpx.Response:
        """Return the server's answer.

        Raises:
            EngineLost: it does not answer.
            httpx.TransportError: likewise.
            EngineError: the answer has more than `most` bytes.
        """
        answer = asyncio.ensure_future(self._sent(url, body, most))
        if not self._open:
            self._heard = self._loop.time()
        self._open.add(answer)
        self._watch = self._watch or self._loop.create_task(self._look_after())
        try:
            return await answer
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # by its caller
                raise
            raise EngineLost(self._lost) from None
        finally:
            self._open.discard(answer)
            self._heard = self._loop.time()

    async def _sent(self, url: str, body: dict[str, Any], most: int) -> httpx.Response:
        said = _Said(most)
        async with self._client.stream("POST", url, json=body) as response:
            async for part in response.aiter_bytes():
                said.add(part)
        return said.answer(response)

    async def _look_after(self) -> None:
        """Give up what is open where the server does not answer when it is asked."""
        while self._open:
            quiet = self._loop.time() - self._heard
            if quiet < QUIET_SECONDS:
                await asyncio.sleep(QUIET_SECONDS - quiet)
                continue
            try:
                await asyncio.to_thread(self._check)
            except EngineLost as lost:
                self._lost = str(lost)
                for answer in self._open:
                    answer.cancel()
            self._heard = self._loop.time()
        self._watch = None

    def close(self) -> None:
        """Give up what is under way and end the loop; more calls do nothing."""
        if not self._closed:
            self._closed = True
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()
