"""A server with OpenAI's chat interface, asked many things at once: no faster than it may be, again where it is busy.

aiohttp asks, which takes half a millisecond of a processor for each answer; httpx and OpenAI's own client, which is
built on it, take thirty times that with a few hundred requests under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import sqlite3
import time
import urllib.request
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sapo_rl.errors import UserError
from sapo_rl.errors.own_code import shorten

if TYPE_CHECKING:
    import aiohttp  # takes a quarter of a second

_MINUTE = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0  # seconds before a request is sent again
_BUSY = (408, 409, 429)  # these and all from 500 on: ask again later
_SHOWN = 300  # characters of what a server answers to a request that it refuses


class ServerError(Exception):
    """The server gave no answer; the message says what it did."""


@dataclass(frozen=True)
class Limits:
    """How much is asked of a server."""

    at_once: int
    requests_per_minute: float | None
    tokens_per_minute: float | None
    retries: int
    answer_timeout: float


@dataclass(frozen=True)
class Asking:
    """How a server is asked."""

    url: str
    model: str
    system: str | None
    temperature: float
    max_tokens: int
    extra: str
    """Further entries of a request, as JSON."""
    key: str | None
    """The environment variable with the server's key."""
    cache: str | None
    limits: Limits

    def body(self, text: str) -> bytes:
        """Return the request for the answer to a question."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        body = {
            "model": self.model,
            "messages": [*system, {"role": "user", "content": text}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            **json.loads(self.extra),
        }
        return json.dumps(body).encode()


class ChatServer:
    """Asks a server, and keeps answers where there is a cache.

    Example:
        >>> server = await chat_server(asking)
        >>> await server.ask("How good is it, from 0 to 10?", 0, float)
        8.0
    """

    def __init__(self, asking: Asking, session: aiohttp.ClientSession) -> None:
        self._asking, self._session = asking, session
        self._room = asyncio.Semaphore(asking.limits.at_once)
        self._requests = _Pace(asking.limits.requests_per_minute)
        self._tokens = _Pace(asking.limits.tokens_per_minute)
        self._cache = None if asking.cache is None else Cache(asking.cache)

    async def ask(self, text: str, vote: int, read: Callable[[str], list[float]]) -> list[float]:
        """Return what `read` makes of the answer to a question; `vote` tells equal ones apart.

        Raises:
            ValueError: an answer that it cannot read, which is not kept.
            ServerError: there is none.
        """
        body = self._asking.body(text)
        name = hashlib.sha256(f"{self._asking.url} {vote} ".encode() + body).hexdigest()
        if self._cache is not None and (known := self._cache.get(name)) is not None:
            with contextlib.suppress(ValueError):  # it was read with other settings
                return read(known)
        async with self._room:
            answer = await self._answer(body)
        said = _said(answer)
        found = read(said)
        if self._cache is not None:
            self._cache.put(name, said)
        return found

    def close(self) -> None:
        """Let go of the cache."""
        if self._cache is not None:
            self._cache.close()

    async def _answer(self, body: bytes) -> Any:
        """Send a request until it is answered, or as often as it may be sent."""
        import aiohttp

        problem = ""
        for retries in range(self._asking.limits.retries + 1):
            await self._requests.take(1)
            await self._tokens.take(0)
            pause = random.uniform(0.5, 1) * min(_FIRST_PAUSE * 2**retries, _LONGEST_PAUSE)
            try:
                async with self._session.post("chat/completions", data=body) as response:
                    said = (await response.read()).decode(errors="replace")
                    if response.ok:
                        return self._counted(said)
                    problem = f"the server answered {response.status}: {shorten(said.strip(), _SHOWN)}"
                    if response.status not in _BUSY and response.status < 500:
                        break
                    pause = _asked_for(response.headers.get("Retry-After"), pause)
            except TimeoutError:
                problem = f"the server gave no answer in {self._asking.limits.answer_timeout:g} s"
            except aiohttp.ClientError as error:
                cause = getattr(error, "os_error", error)
                problem = f"no connection to the server: {str(cause) or type(error).__name__}"
            if retries < self._asking.limits.retries:
                await asyncio.sleep(pause)
        raise ServerError(f"{problem} ({self._asking.url})")

    def _counted(self, said: str) -> Any:
        try:
            answer = json.loads(said)
            self._tokens.note((answer.get("usage") or {}).get("total_tokens") or 0)
        except (ValueError, AttributeError, TypeError) as error:
            raise ServerError(f"the server's answer is no JSON of OpenAI's: {shorten(said, _SHOWN)}") from error
        return answer


def _said(answer: Any) -> str:
    if not answer.get("choices"):
        raise ValueError("the judge's server answered without choices")
    try:
        return answer["choices"][0]["message"]["content"] or ""
    except (LookupError, TypeError) as error:
        raise ServerError(f"the server's answer has no message: {shorten(json.dumps(answer), _SHOWN)}") from error


def _asked_for(seconds: str | None, otherwise: float) -> float:
    """The pause that a busy server asks for, bounded."""
    try:
        return min(max(float(seconds or ""), 0.0), _LONGEST_PAUSE)
    except ValueError:  # none, or a date
        return otherwise


class _Pace:
    """Spreads something evenly over a minute."""

    def __init__(self, per_minute: float | None) -> None:
        self._seconds = 0.0 if per_minute is None else _MINUTE / per_minute
        self._next = time.monotonic()

    async def take(self, count: int) -> None:
        """Wait for one's turn, and use `count` of it."""
        now = time.monotonic()
        turn = max(self._next, now)
        self._next = turn + count * self._seconds
        if turn > now:
            await asyncio.sleep(turn - now)

    def note(self, count: int) -> None:
        """Count what was used without asking before."""
        self._next = max(self._next, time.monotonic()) + count * self._seconds


class Cache:
    """Answers on disk, which several processes of a machine share.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, path: str) -> None:
        try:
            self._file = sqlite3.connect(path, timeout=_MINUTE, isolation_level=None)
            # A write-ahead log, so that no answer waits for the disk; a power cut may lose the last ones.
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = NORMAL")
            self._file.execute("CREATE TABLE IF NOT EXISTS answers (name TEXT PRIMARY KEY, text TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise UserError(f"judge: the cache '{path}' cannot be written: {error}") from error

    def get(self, name: str) -> str | None:
        """Return an answer that is known."""
        row = self._file.execute("SELECT text FROM answers WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def put(self, name: str, text: str) -> None:
        """Keep an answer."""
        self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (name, text))

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


_SERVERS: dict[tuple[asyncio.AbstractEventLoop, Asking], tuple[ChatServer, AsyncGenerator[ChatServer]]] = {}


async def chat_server(asking: Asking) -> ChatServer:
    """Return the server for these settings, whose connections last as long as the event loop.

    Raises:
        UserError: this process does not see the key.
    """
    place = (asyncio.get_running_loop(), asking)
    if place not in _SERVERS:
        check_key(asking.key)
        lasting = _lasting(asking)
        _SERVERS[place] = (await anext(lasting), lasting)
    return _SERVERS[place][0]


async def _lasting(asking: Asking) -> AsyncGenerator[ChatServer]:
    """Give a server; the event loop closes this generator at its end, and with it the connections."""
    import aiohttp

    url = urlsplit(asking.url)
    key = {"Authorization": f"Bearer {os.environ[asking.key]}"} if asking.key else {}
    # Not `trust_env`, which also looks for a key of its own in ~/.netrc, for every request.
    proxy = None if urllib.request.proxy_bypass(url.netloc) else urllib.request.getproxies().get(url.scheme)
    session = aiohttp.ClientSession(
        asking.url.rstrip("/") + "/",
        connector=aiohttp.TCPConnector(limit=0),  # `at_once` bounds it
        headers={"Content-Type": "application/json", **key},
        timeout=aiohttp.ClientTimeout(asking.limits.answer_timeout),
        proxy=proxy,
    )
    try:
        async with session:
            server = ChatServer(asking, session)
            yield server
            server.close()
    finally:
        _SERVERS.pop((asyncio.get_running_loop(), asking), None)


def check_key(key: str | None) -> None:
    """Refuse a variable with the server's key that this process does not see, by a UserError."""
    if key is not None and key not in os.environ:
        raise UserError(f"judge: there is no environment variable '{key}'; name it in reward.env too")
