"""Servers of OpenEnv: each episode is a session over the server's WebSocket, as OpenEnv's own client has it.

The package openenv itself does not go together with vLLM (they want different versions of mcp), and is needed on the
server alone: what goes to and fro is JSON.
"""

from __future__ import annotations

import json
from typing import Any

from sapo_rl.environments.adapters import package
from sapo_rl.environments.registry import ENVIRONMENTS
from sapo_rl.errors import UserError

NAME = "openenv"
LARGEST_MESSAGE = 100 * 2**20
"""Bytes that a server may answer, as for OpenEnv's client."""


@ENVIRONMENTS.register_module(NAME)
class OpenEnv:
    """Plays with an OpenEnv server whose actions have a field for text.

    Args:
        url: the server's address, such as `http://127.0.0.1:8000`.
        action: the field of an action that takes the model's reply.
        observation: the field of an observation that the model is shown; null shows all of it as JSON.
        action_args: further fields of every action.
        reset_args: arguments of the server's `reset` beside the seed.

    Raises:
        UserError: an address of another kind, or no package websockets.
    """

    def __init__(
        self,
        url: str,
        action: str,
        observation: str | None = None,
        action_args: dict[str, Any] | None = None,
        reset_args: dict[str, Any] | None = None,
    ) -> None:
        scheme, colon, place = url.rstrip("/").partition("://")
        schemes = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
        if not colon or not place or scheme not in schemes:
            raise UserError(f"environment.args.url: '{url}' is no address such as http://127.0.0.1:8000")
        self._url = f"{schemes[scheme]}://{place}/ws"
        self._action, self._observation = action, observation
        self._action_args, self._reset_args = action_args or {}, reset_args or {}
        self._connect = package("websockets.asyncio.client", NAME).connect
        self._socket: Any = None

    async def reset(self, seed: int) -> str:
        """Open a session; the first observation goes to the end of the prompt."""
        local = self._url.partition("://")[2].startswith(("127.", "localhost", "[::1]"))
        way = {"proxy": None} if local else {}
        self._socket = await self._connect(self._url, max_size=LARGEST_MESSAGE, **way)
        found = await self._ask("reset", {**self._reset_args, "seed": seed % 2**31})
        return f"\n\n{self._shown(found)}"

    async def step(self, reply: str) -> tuple[str | None, float, bool]:
        """Send a reply as an action."""
        found = await self._ask("step", {**self._action_args, self._action: reply})
        done = bool(found.get("done"))
        return None if done else self._shown(found), found.get("reward") or 0.0, done

    async def close(self) -> None:
        """End the session."""
        if self._socket is not None:
            await self._socket.close()

    async def _ask(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        await self._socket.send(json.dumps({"type": kind, "data": data}))
        answer = json.loads(await self._socket.recv())
        if answer.get("type") == "error":
            raise RuntimeError(f"the server said: {answer['data'].get('message')} ({answer['data'].get('code')})")
        return answer["data"]

    def _shown(self, found: dict[str, Any]) -> str:
        seen = found.get("observation", {})
        if self._observation is None:
            return json.dumps(seen, ensure_ascii=False)
        if self._observation not in seen:
            raise KeyError(f"the observation has no field '{self._observation}'; it has: {', '.join(seen)}")
        return str(seen[self._observation])
