"""A server with OpenAI's chat interface, asked many things at once: no faster than it may be, again where it is busy.

aiohttp asks, which takes less than a millisecond of a processor for each answer (scripts/bench/judge.py); httpx, and
OpenAI's own client, which is built on it, take many times that with a few hundred requests under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sapo_rl.errors import UserError
from sapo_rl.processes.posting import ServerError, client, excerpt, key_in, lasting, post

if TYPE_CHECKING:
    import aiohttp  # takes a quarter of a second

_MINUTE = 60.0


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
        self._url = f"{asking.url.rstrip('/')}/chat/completions"
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
            retries = self._asking.limits.retries
            said = await post(self._session, self._url, body, self._counted, retries, self._turn)
        found = read(said)
        if self._cache is not None:
            self._cache.put(name, said)
        return found

    def close(self) -> None:
        """Let go of the cache."""
        if self._cache is not None:
            self._cache.close()

    async def _turn(self) -> None:
        """Wait until a request may be sent."""
        await self._requests.take(1)
        await self._tokens.take(0)

    def _counted(self, said: str) -> str:
        """What an answer says; its tokens are counted."""
        try:
            answer = json.loads(said)
            self._tokens.note((answer.get("usage") or {}).get("total_tokens") or 0)
            choices = answer.get("choices") or []
            content = choices[0]["message"]["content"] or "" if choices else None
            if not isinstance(content, str | None):
                raise TypeError("content is no text")
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise ServerError(f"the server's answer is none of OpenAI's: {excerpt(said)}") from error
        if content is None:
            raise ValueError("the judge's server answered without choices")
        return content


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
        self._path, self._full = path, False
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
        """Keep an answer; a full disk is told once, and costs no reward."""
        try:
            self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (name, text))
        except sqlite3.Error as error:
            if not self._full:
                print(f"judge: the cache '{self._path}' cannot be written, answers are not kept: {error}", flush=True)
            self._full = True

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


async def chat_server(asking: Asking) -> ChatServer:
    """Return the server for these settings, whose connections last as long as the event loop.

    Raises:
        UserError: this process does not see the key.
    """
    secret = key_of_judge(asking.key)
    return await lasting(asking, lambda: _opened(asking, secret))


@contextlib.asynccontextmanager
async def _opened(asking: Asking, secret: str | None) -> AsyncGenerator[ChatServer]:
    async with client(asking.url, secret, asking.limits.answer_timeout) as session:
        with contextlib.closing(ChatServer(asking, session)) as server:
            yield server


def key_of_judge(variable: str | None) -> str | None:
    """Return the server's key, as `key_in`; raises UserError where this process does not see the variable."""
    try:
        return key_in(variable)
    except ValueError as error:
        raise UserError(f"judge: {error}") from error
