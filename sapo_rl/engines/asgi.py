"""The few steps of an HTTP call by ASGI, the interface of Python's asynchronous web servers."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


def bearer(scope: Scope) -> bytes:
    """Return the key of a request's `Authorization: Bearer <key>`; empty where there is none."""
    given = dict(scope["headers"]).get(b"authorization", b"")
    return given.removeprefix(b"Bearer ") if given.startswith(b"Bearer ") else b""


async def gather(receive: Receive, most: int) -> bytes | None:
    """Return the whole body; None where it has more than `most` bytes, or the client goes away."""
    parts, size, more = list[bytes](), 0, True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > most or message["type"] == "http.disconnect":
            return None
    return b"".join(parts)


async def gone(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_json(send: Send, status: int, content: dict[str, Any]) -> None:
    """Answer with JSON."""
    await send_body(send, status, b"application/json", json.dumps(content).encode())


async def send_body(send: Send, status: int, kind: bytes, body: bytes) -> None:
    """Answer with a whole body of that content type."""
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
