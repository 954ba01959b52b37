"""What `sapo-serve --episodes` answers beside: agents that no run starts, their episodes recorded."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import Any

from sapo_rl.config import Config
from sapo_rl.engines.asgi import App, Receive, Scope, Send
from sapo_rl.engines.base import Request, Sampling
from sapo_rl.engines.vllm.api import DEAD, NOT_THOSE_WEIGHTS, CallFailed, TrainerApi
from sapo_rl.environments import AGENTS
from sapo_rl.environments.chat import ChatTemplate
from sapo_rl.policy.model import load_tokenizer, stop_tokens
from sapo_rl.rollout.agents.recorder import Recorder, Written
from sapo_rl.rollout.agents.wire import Refusal
from sapo_rl.run.compose import loads

VARIABLE = "SAPO_EPISODES"
"""Brings the frozen config to the server."""
WEIGHTS_SECONDS = 60.0
"""A request waits for weights that come."""
NO_WEIGHTS = "the weights are half loaded, and nobody sends them again; start the server anew, or a run that uses it"


def for_agents(config: Config) -> Config:
    """Return the config with an agent in it: as it is, where its episodes have turns already."""
    if config.has_episodes:
        return config
    return replace(config, environment=replace(config.environment, name=AGENTS[0]))


def recorder_of(config: Config) -> tuple[Recorder, list[int]]:
    """Return what records, and the tokens that end a reply; the limits are those of the first agent that it names.

    Raises:
        UserError: the model has no tokenizer, no chat template or no end-of-sequence token.
    """
    tokenizer, played = load_tokenizer(config.model), config.played
    chosen = next((name for name, one in played.items() if one.name in AGENTS), next(iter(played)))
    template = ChatTemplate(tokenizer, parser=config.rollout.tool_parser, arguments=config.data.chat_template_args)
    key = f"environments.{chosen}" if chosen else "environment"
    return Recorder(config, played[chosen], key, template), stop_tokens(config.model, tokenizer)


class EpisodesApi(TrainerApi):
    """The middleware of `sapo-serve --episodes`."""

    def __init__(self, app: App) -> None:
        super().__init__(app)
        self.recorder, self.stop_token_ids = recorder_of(for_agents(loads(os.environ[VARIABLE])))

    async def pass_on(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Answer what is for the recorder; the rest is vLLM's."""
        if not self.recorder.takes(scope["path"]):
            await super().pass_on(scope, body, receive, send)
            return

        async def write(token_ids: list[int], sampling: Sampling) -> Written:
            return await self._write(scope["app"].state.engine_client, token_ids, sampling)

        await self.recorder.answer(scope, body, receive, send, write)

    async def _write(self, engine: Any, token_ids: list[int], sampling: Sampling) -> Written:
        """Have whatever weights there are write a reply; where they go away meanwhile, those that come write it anew.

        Raises:
            Refusal: the engine does not answer, or there are no weights.
        """
        while True:
            try:
                async with asyncio.timeout(WEIGHTS_SECONDS):
                    begun = await self.held.whole()
            except TimeoutError:
                raise Refusal(NO_WEIGHTS, DEAD, "server_error") from None
            try:
                with self.worded():
                    request = Request(token_ids, 1)
                    (completion,) = await self.complete(engine, begun, request, sampling, self.stop_token_ids)
                return Written(completion, (begun, self.held.weight_id or begun))
            except CallFailed as failed:
                if failed.status != NOT_THOSE_WEIGHTS:
                    raise Refusal(str(failed), failed.status, "server_error") from None
