"""An agent that brings its own loop: any code that asks the model by OpenAI's client; its requests are trained on."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from sapo_rl import plugins
from sapo_rl.environments.registry import ENVIRONMENTS
from sapo_rl.errors import UserError

AGENT = "endpoint"
"""What the environment is called."""
KIND = "agent"
MOST_THREADS = 1024
"""Of a process: agents that are no coroutines, at once."""


@ENVIRONMENTS.register_module(AGENT)
class Endpoint:
    """Has an agent play the whole episode: what it asks the model and is answered makes the rows that are trained on.

    Args:
        run: dotted path of `run(client, row) -> float`, a function or a coroutine function. It gets a client of the
            package openai, `OpenAI` or for a coroutine `AsyncOpenAI`, and the columns of the row, with the prompt under
            `prompt` and the group's `seed`; it returns the reward.

    Raises:
        UserError: there is no such function, or no package openai.

    Example:
        >>> async def run(client, row):
        ...     said = await client.chat.completions.create(model="policy", messages=row["prompt"])
        ...     return float(row["answer"] in said.choices[0].message.content)
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """Columns without which it cannot play."""

    def __init__(self, run: str) -> None:
        self.run: Callable[..., Any] = plugins.find(KIND, run)
        if not callable(self.run):
            raise UserError(f"{KIND} '{run}' is a {type(self.run).__name__}, not a function")
        try:
            inspect.Signature([*plugins.parameters_of(self.run).values()]).bind(None, None)
        except TypeError as error:
            raise UserError(f"{KIND} '{run}' must be callable as run(client, row): {error}") from error
        _clients()
        reach_this_machine()

    async def play(self, row: dict[str, Any], url: str, key: str) -> Any:
        """Return what the agent returns; one that is no coroutine function runs in a thread of its own."""
        one, several = _clients()
        if any(map(inspect.iscoroutinefunction, (self.run, type(self.run).__call__))):
            return await self.run(several.with_options(base_url=url, api_key=key), row)
        client = one.with_options(base_url=url, api_key=key)
        return await asyncio.get_running_loop().run_in_executor(_threads(), self.run, client, row)


@functools.cache
def reach_this_machine() -> None:
    """Have clients that agents make themselves ask the server of the run, not a proxy that the environment names."""
    for name in ("NO_PROXY", "no_proxy"):
        others = os.environ.get(name)
        os.environ[name] = ",".join(filter(None, (others, "127.0.0.1")))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="agent")


@functools.cache
def _clients() -> tuple[Any, Any]:
    """An OpenAI and an AsyncOpenAI whose connections all agents of the process share.

    They wait as long as it takes, and ask once: what the model has written twice would be trained on twice.
    """
    try:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI
    except ImportError as error:
        raise UserError(
            f"environment '{AGENT}' needs the package openai: pip install 'sapo-train[endpoint]'"
        ) from error

    class Shared(DefaultHttpxClient):
        def close(self) -> None:  # an agent that is done closes its client
            pass

    class SharedAsync(DefaultAsyncHttpxClient):
        async def aclose(self) -> None:
            pass

    settings: dict[str, Any] = {"api_key": "none", "base_url": "http://127.0.0.1", "timeout": None, "max_retries": 0}
    # A proxy of the environment's is not for the way to this machine.
    return (
        OpenAI(**settings, http_client=Shared(trust_env=False)),
        AsyncOpenAI(**settings, http_client=SharedAsync(trust_env=False)),
    )
