"""Episodes of agents that no run starts: each answered as an agent of a run is, kept by its name, read back."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

from sapo_rl.config import Config, EnvironmentConfig
from sapo_rl.engines.asgi import Receive, Scope, Send, send_json
from sapo_rl.engines.base import Completion, Sampling
from sapo_rl.environments.chat import ChatTemplate
from sapo_rl.rollout.agents.server import COMPLETIONS, reply_to
from sapo_rl.rollout.agents.talk import Talk, Templates
from sapo_rl.rollout.agents.wire import Refusal, finish, new_id, parsed
from sapo_rl.rollout.collector import sampling_of

logger = logging.getLogger("vllm.sapo")

HEADER = "X-Session-Id"
"""Names the episode of a request."""
EPISODES = "/episodes"
MOST_EPISODES, MOST_TOKENS = 10_000, 10_000_000
"""Kept, with their prompts: half a gigabyte."""
MOST_NAMES = 100_000
"""Of episodes that were dropped."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@=+-]{0,127}")  # clients take .. in an address for a step up


class Written(NamedTuple):
    """A reply, and the ids of the weights that began and ended it."""

    completion: Completion
    weights: tuple[str, str]


Write: TypeAlias = Callable[[list[int], Sampling], Awaitable[Written]]
"""Has the model go on from a prompt."""


@dataclass
class _Episode:
    talk: Talk
    weights: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Of each reply."""
    open: int = 0
    """Requests under way."""
    tokens: int = 0
    at: float = field(default_factory=time.time)
    """When it was last asked for something."""


class Recorder:
    """Answers OpenAI's chat completions, and keeps what was said in each episode; all belongs to one event loop.

    Where there are too many episodes or tokens, those that were not asked for the longest are dropped.

    Args:
        config: how replies are sampled.
        limits: of an episode.
        key: where they stand in the config.
        template: the model's.
    """

    def __init__(self, config: Config, limits: EnvironmentConfig, key: str, template: ChatTemplate) -> None:
        self.sampling = replace(sampling_of(config.rollout), logprobs=True)
        """Of every reply."""
        self.limits, self.key = limits, key
        self._config = config
        self._templates = Templates(template, config.rollout.tool_parser)
        self._episodes: dict[str, _Episode] = {}
        """By name; the one that was asked last is the last."""
        self._dropped: dict[str, None] = {}
        self._tokens = 0

    def takes(self, path: str) -> bool:
        """Return whether a path is for it to answer."""
        return path in (COMPLETIONS, EPISODES) or path.startswith(f"{EPISODES}/")

    async def answer(self, scope: Scope, body: bytes, receive: Receive, send: Send, write: Write) -> None:
        """Answer one request for such a path; `write` asks the model."""
        method, path = scope["method"], scope["path"]
        try:
            if path == COMPLETIONS and method == "POST":
                await self._complete(scope, body, receive, send, write)
            elif path == EPISODES and method == "GET":
                await send_json(send, 200, {"episodes": [_line(*one) for one in self._episodes.items()]})
            elif path not in (COMPLETIONS, EPISODES) and method in ("GET", "DELETE"):
                name = path.removeprefix(f"{EPISODES}/")
                told = self._told(name, self._known(name))
                if method == "DELETE":  # before it is sent: a reply that came meanwhile would be told to nobody
                    self._forget(name)
                await send_json(send, 200, told)
            else:
                valid = f"POST {COMPLETIONS}, GET {EPISODES}, GET or DELETE {EPISODES}/<session>"
                raise Refusal(f"there is no {method} {path}; valid: {valid}", 405, "not_found")
        except Refusal as refusal:
            if refusal.status == 500 and refusal.__cause__ is not None:
                logger.error("an agent's request failed", exc_info=refusal.__cause__)
            await send_json(send, refusal.status, refusal.body)

    async def _complete(self, scope: Scope, body: bytes, receive: Receive, send: Send, write: Write) -> None:
        given = dict(scope["headers"]).get(HEADER.lower().encode())
        name = new_id() if given is None else given.decode("latin-1")
        if not _NAME.fullmatch(name):
            raise Refusal(f"{HEADER}: must be 1 to 128 letters, digits or any of ._:@=+-, the first a letter or digit")
        asked = parsed(body, self._config.rollout)
        episode = self._begun(name, write)
        episode.open += 1
        try:
            await reply_to(asked, episode.talk, name if given is None else new_id(), receive, send)
        finally:
            episode.open -= 1
            if self._episodes.get(name) is episode:
                self._measure(name, episode)

    def _begun(self, name: str, write: Write) -> _Episode:
        """The episode of that name, begun where there is none."""
        if name in self._episodes or name in self._dropped:
            return self._known(name)
        weights: list[tuple[str, str]] = []

        async def ask(token_ids: list[int], room: int, turn: int) -> Completion:
            most = min(room, self.sampling.max_tokens)
            completion, by = await write(token_ids, replace(self.sampling, max_tokens=most))
            weights.append(by)
            return completion

        talk = Talk(self._config, self.limits, self.key, self._templates, ask, contextlib.nullcontext)
        self._episodes[name] = _Episode(talk, weights)
        return self._episodes[name]

    def _known(self, name: str) -> _Episode:
        if name in self._dropped:
            raise Refusal(
                f"the episode '{name}' was dropped: the last {MOST_EPISODES:,} are kept, as far as they have "
                f"{MOST_TOKENS:,} tokens together; read an episode, and DELETE it, as soon as it is over",
                410,
                "episode_dropped",
            )
        if name not in self._episodes:
            raise Refusal(f"there is no episode '{name}'", 404, "not_found")
        return self._episodes[name]

    def _measure(self, name: str, episode: _Episode) -> None:
        """Note that it was asked, and how long it is now; drop others where all are too much."""
        rows, _ = episode.talk.rows()
        tokens = sum(len(row.prompt_ids) + len(row.token_ids) for row in rows)
        self._tokens += tokens - episode.tokens
        episode.tokens, episode.at = tokens, time.time()
        if not rows and not episode.open:  # refused: nothing is lost
            self._forget(name)
            return
        self._episodes[name] = self._episodes.pop(name)
        while len(self._episodes) > MOST_EPISODES or self._tokens > MOST_TOKENS:
            idle = (other for other, one in self._episodes.items() if not one.open and one is not episode)
            if (oldest := next(idle, None)) is None:
                return
            self._forget(oldest)
            self._dropped[oldest] = None
            if len(self._dropped) > MOST_NAMES:
                del self._dropped[next(iter(self._dropped))]

    def _forget(self, name: str) -> None:
        """Give up what is under way of an episode, and the rest of it."""
        episode = self._episodes.pop(name)
        self._tokens -= episode.tokens
        episode.talk.close()

    def _told(self, name: str, episode: _Episode) -> dict[str, Any]:
        """An episode as JSON."""
        talk = episode.talk
        rows, turns = talk.rows()
        conversations = talk.messages() if turns else []
        return _line(name, episode) | {
            "model": self._config.model.path,
            "temperature": self.sampling.temperature,
            "rows": [
                {
                    "prompt_ids": row.prompt_ids,
                    "token_ids": row.token_ids,
                    "loss_mask": [(0, len(row.token_ids))] if row.loss_mask is None else row.loss_mask,
                    "rollout_logps": row.rollout_logps,
                }
                for row in rows
            ],
            "turns": [
                turn._asdict() | {"finish_reason": finish(reply), "weights": weights}
                for turn, reply, weights in zip(turns, talk.replies, episode.weights, strict=True)
            ],
            "conversations": [{"opening": opening, "messages": said} for opening, said in conversations],
            "stop": talk.limit,
            "tool_calls": talk.tool_calls,
            "tool_failures": talk.tool_failures,
        }


def _line(name: str, episode: _Episode) -> dict[str, Any]:
    """What a list of episodes says of one."""
    told = {"session": name, "replies": len(episode.talk.replies), "tokens": episode.tokens}
    return told | {"under_way": episode.open, "at": episode.at}
