"""The HTTP server on this machine's loopback that agents ask, each with the key of its episode."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Iterator
from typing import Any

from sapo_rl.config import RolloutConfig
from sapo_rl.engines.asgi import Receive, Scope, Send, bearer, gather, gone, send_body, send_json
from sapo_rl.engines.vllm.bodies import MOST_BYTES
from sapo_rl.errors import UserError
from sapo_rl.rollout.agents.talk import Talk
from sapo_rl.rollout.agents.wire import Asked, Refusal, completion, events, new_id, parsed

COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/models"
IDLE_SECONDS = 86400
"""A connection stays open: one that the server closes just as an agent asks would fail that episode."""
OVER = Refusal("the episode is over", status=410, code="episode_over")


class AgentServer:
    """Answers OpenAI's `/v1/chat/completions`; all methods belong to one event loop.

    Args:
        cfg: how the run samples, which requests cannot change.
    """

    def __init__(self, cfg: RolloutConfig) -> None:
        self.url = ""
        """What a client takes for its `base_url`; known once the server is open."""
        self._cfg = cfg
        self.serving: asyncio.Task[None] | None = None
        """Ends once the server is closed."""
        self._talks: dict[str, Talk] = {}
        """By the key of their episode."""

    async def open(self) -> None:
        """Listen. Raises UserError without the package uvicorn."""
        try:
            import uvicorn
        except ImportError as error:
            raise UserError(
                "environment 'endpoint' needs the package uvicorn: pip install 'sapo-train[endpoint]'"
            ) from error
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        settings: dict[str, Any] = {"interface": "asgi3", "lifespan": "off", "log_config": None, "access_log": False}
        self._server = uvicorn.Server(uvicorn.Config(self, **settings, timeout_keep_alive=IDLE_SECONDS))
        self.serving = asyncio.create_task(self._server.serve([listener]))
        while not self._server.started:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Answer nothing more."""
        if self.serving is not None:
            self._server.should_exit = self._server.force_exit = True
            await asyncio.gather(self.serving, return_exceptions=True)

    @contextlib.contextmanager
    def admitted(self, talk: Talk) -> Iterator[str]:
        """Have an episode's requests answered inside the context, which is the key that its agent needs."""
        key = secrets.token_urlsafe(32)
        self._talks[key] = talk
        try:
            yield key
        finally:
            del self._talks[key]
            talk.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        talk = self._talks.get(bearer(scope).decode("latin-1"))
        try:
            if talk is None:
                raise Refusal("there is no episode with this key; use the client that run() gets", 401, "unauthorized")
            await self._answer(talk, scope, receive, send)
        except Refusal as refusal:
            await send_json(send, refusal.status, refusal.body)

    async def _answer(self, talk: Talk, scope: Scope, receive: Receive, send: Send) -> None:
        if (scope["method"], scope["path"]) == ("GET", MODELS):
            await send_json(send, 200, {"object": "list", "data": [{"id": "policy", "object": "model"}]})
            return
        if (scope["method"], scope["path"]) != ("POST", COMPLETIONS):
            raise Refusal(f"there is no {scope['method']} {scope['path']}; valid: POST {COMPLETIONS}", 404, "not_found")
        if (body := await gather(receive, MOST_BYTES)) is None:
            raise Refusal(f"the body has more than {MOST_BYTES} bytes", 413, "too_large")
        await reply_to(parsed(body, self._cfg), talk, new_id(), receive, send)


async def reply_to(asked: Asked, talk: Talk, name: str, receive: Receive, send: Send) -> None:
    """Have the model reply and send that under this id; stop where the client goes away.

    Raises:
        Refusal: there is no reply.
    """
    call, left = asyncio.ensure_future(talk.answer(asked)), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait((call, left), return_when=asyncio.FIRST_COMPLETED)
        if not call.done():
            return
        if call.cancelled():
            raise OVER
        reply = call.result()
    finally:
        left.cancel()
        call.cancel()
    if asked.stream:
        await send_body(send, 200, b"text/event-stream", events(reply, name, asked.counts))
    else:
        await send_json(send, 200, completion(reply, name))
