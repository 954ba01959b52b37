"""Posting JSON to a server that may be busy, slow or gone for a while."""

from __future__ import annotations

import asyncio
import math
import os
import random
import re
import time
import urllib.request
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable
from contextlib import AbstractAsyncContextManager
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import aiohttp  # takes a quarter of a second

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0  # seconds before a request is sent again
_BUSY = (408, 409, 429)  # these and all from 500 on: ask again later
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHOWN = 300  # characters of what a server answers
_LONGEST = 1 << 26  # bytes of an answer
_KEEP_SECONDS = 1.0  # an idle connection is used again; servers close theirs after 2 s and more, perhaps just then
_LASTING: dict[tuple[asyncio.AbstractEventLoop, Hashable], tuple[Any, AsyncGenerator[Any]]] = {}


class ServerError(OSError):
    """A server gave no answer; the message says what it did."""


class AnswerTooLong(ServerError):
    """A server's answer went on and on; no more of it was read."""


class TryAgain(Exception):
    """An answer by which a server says that it has failed; the message says how."""


def check_url(url: Any) -> None:
    """Raise ValueError where nothing can be posted to an address, or where it holds a password."""
    if not str(url).startswith(("http://", "https://")):
        raise ValueError(f"url is '{url}', must begin with http:// or https://")
    if "@" in url.split("/")[2]:
        raise ValueError("url holds a user or password, which would stand in configs and logs; name a key's variable")
    try:
        parts = urlsplit(url)
        usable = parts.hostname and parts.hostname.encode("idna") and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"url is '{url}', which has no usable host and port")


def is_variable(name: Any) -> bool:
    """Whether an environment variable can be called so; None, for no key, too."""
    return name is None or _VARIABLE.fullmatch(str(name)) is not None


def key_in(variable: str | None) -> str | None:
    """Return the key that an environment variable holds; None without one.

    Raises:
        ValueError: this process does not see the variable.
    """
    if variable is not None and variable not in os.environ:
        raise ValueError(f"there is no environment variable '{variable}'; name it in reward.env too")
    return None if variable is None else os.environ[variable]


def client(url: str, key: str | None, seconds: float) -> aiohttp.ClientSession:
    """Return what posts to a server; a context manager. It has as many connections as requests under way.

    Args:
        url: of the server; a proxy of the environment is used.
        key: sent as a bearer token.
        seconds: for each answer.
    """
    import aiohttp

    parts = urlsplit(url)
    # Not `trust_env`, which also looks for a key of its own in ~/.netrc, for every request.
    proxy = None if urllib.request.proxy_bypass(parts.netloc) else urllib.request.getproxies().get(parts.scheme)
    if proxy and "://" not in proxy:
        proxy = f"http://{proxy}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_SECONDS),
        headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {key.strip()}"} if key else {})},
        timeout=aiohttp.ClientTimeout(seconds),
        proxy=proxy,
    )


async def lasting(name: Hashable, made: Callable[[], AbstractAsyncContextManager[T]]) -> T:
    """Return what was made under a name in the running event loop, which closes it at its end.

    Args:
        name: of the same type of thing always.
        made: called the first time; entering what it returns must not wait for anything.

    Example:
        >>> session = await lasting(url, lambda: client(url, None, 60.0))
    """
    place = (asyncio.get_running_loop(), name)
    if place not in _LASTING:
        kept = _kept(place, made())
        _LASTING[place] = (await anext(kept), kept)
    return _LASTING[place][0]


async def _kept(
    place: tuple[asyncio.AbstractEventLoop, Hashable], made: AbstractAsyncContextManager[T]
) -> AsyncGenerator[T]:
    """Give what was made; event loops close their generators at their end."""
    try:
        async with made as value:
            yield value
    finally:
        _LASTING.pop(place, None)


async def post(
    session: aiohttp.ClientSession,
    url: str,
    body: bytes,
    read: Callable[[str], T],
    retries: int,
    turn: Callable[[], Awaitable[Any]] | None = None,
    seconds: float | None = None,
) -> T:
    """Return what `read` makes of a server's answer.

    A request that is not answered, or by 408, 409, 429 or 5xx, is sent again after a pause that doubles from half a
    second to a minute, or after that which the server asks for. Nothing is sent to where a server leads on: the address
    is the user's choice, and a POST would become a GET.

    Args:
        session: of `client`.
        url: where to.
        body: JSON.
        read: makes something of the text; may raise TryAgain, or what is not to be repeated.
        retries: how often it is sent again.
        turn: waits until it may be sent.
        seconds: for each answer, where they are not those of the session.

    Raises:
        ServerError: there is no answer, or one that says so.
        AnswerTooLong: it has more than 64 MiB.
    """
    import aiohttp

    problem = ""
    timeout = session.timeout if seconds is None else aiohttp.ClientTimeout(seconds)
    for retry in range(retries + 1):
        if turn is not None:
            await turn()
        pause = random.uniform(0.5, 1) * min(_FIRST_PAUSE * 2**retry, _LONGEST_PAUSE)
        try:
            async with session.post(url, data=body, allow_redirects=False, timeout=timeout) as response:
                said = await _text(response)
            if response.status < 300:
                return read(said)
            problem = f"the server answered {response.status}: {excerpt(response.headers.get('Location') or said)}"
            if response.status not in _BUSY and response.status < 500:
                break
            pause = _asked_for(response.headers.get("Retry-After"), pause)
        except TryAgain as error:
            problem = str(error)
        except TimeoutError:
            problem = f"the server gave no answer in {timeout.total:g} s"
        except aiohttp.ClientError as error:
            cause = getattr(error, "os_error", error)
            problem = f"no connection to the server: {str(cause) or type(error).__name__}"
        if retry < retries:
            await asyncio.sleep(pause)
    raise ServerError(f"{problem} ({url})")


def excerpt(said: str) -> str:
    """Return as much of an answer as is shown."""
    return said.strip()[:_SHOWN]


async def _text(response: aiohttp.ClientResponse) -> str:
    said = bytearray()
    async for chunk in response.content.iter_any():
        said += chunk
        if len(said) > _LONGEST:
            raise AnswerTooLong(f"the server's answer has more than {_LONGEST:,} bytes ({response.url})")
    return said.decode(errors="replace")


def _asked_for(pause: str | None, otherwise: float) -> float:
    """The pause that a busy server asks for, in seconds or until a date, bounded."""
    try:
        seconds = float(pause or "")
    except ValueError:
        try:
            seconds = parsedate_to_datetime(pause or "").timestamp() - time.time()
        except (ValueError, OverflowError):  # neither
            return otherwise
    return min(max(seconds, 0.0), _LONGEST_PAUSE) if not math.isnan(seconds) else otherwise
