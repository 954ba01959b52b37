"""What an agent says to the model in one episode, and the rows of tokens that come of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from sapo_rl.config import Config, EnvironmentConfig
from sapo_rl.engines.base import Completion
from sapo_rl.environments.chat import ChatTemplate, Conversation, Refused
from sapo_rl.environments.messages import Message, as_users
from sapo_rl.errors import UserError
from sapo_rl.rollout.agents.wire import Asked, Refusal, Reply, Said, said
from sapo_rl.types import Row, Stop, Turn

Ask: TypeAlias = Callable[[list[int], int, int], Awaitable[Completion]]
"""Has the model go on from a prompt, with so many tokens at most; the last is how often that has been asked."""
TEMPLATES = 128
"""Sets of tools for which what the chat template makes of them is kept."""


class Templates:
    """The model's chat template with whatever tools an agent offers."""

    def __init__(self, plain: ChatTemplate, parser: str) -> None:
        self._plain, self._parser = plain, parser
        self._of = lru_cache(TEMPLATES)(self._make)

    def of(self, tools: list[dict[str, Any]]) -> ChatTemplate:
        """Return it with these tools. Raises UserError where the template has no words for them."""
        return self._of(json.dumps(tools, sort_keys=True)) if tools else self._plain

    def _make(self, tools: str) -> ChatTemplate:
        plain = self._plain
        return ChatTemplate(plain.tokenizer, tools=json.loads(tools), parser=self._parser, arguments=plain.arguments)


@dataclass(eq=False)
class _Thread:
    """A conversation that goes on: its requests begin with what was said before."""

    conversation: Conversation
    said: list[Said]
    """By the agent and the model, as they have worded it."""
    prompt: int
    """Messages before the model's first."""
    owed: bool = True
    """Whether the model has not replied to the last of it."""
    busy: bool = False
    """Whether it is about to."""


class Talk:
    """Answers the requests of an episode's agent, and keeps the tokens.

    A request that goes on with what was said before, in any of the conversations that there are, extends its row by
    what is new; any other begins a row of its own.

    Args:
        config: the run's.
        limits: of the episode.
        key: where they stand in the config.
        templates: by tools.
        ask: the engines.
        waiting: gives a context for the time in which the agent waits for the model.
    """

    def __init__(
        self,
        config: Config,
        limits: EnvironmentConfig,
        key: str,
        templates: Templates,
        ask: Ask,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.limit: Stop | None = None
        """Which limit of the episode has refused a request."""
        self.refusal = ""
        """Why the last request that was refused was so."""
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails with what is not the agent's fault: an engine's error."""
        self.tool_calls = self.tool_failures = 0
        """Calls that the model made, and malformed ones among them."""
        self._config, self._limits, self._key, self._templates = config, limits, key, templates
        self._ask, self._waiting = ask, waiting
        self._threads: list[_Thread] = []
        self._spoken: list[_Thread] = []
        """Who got each reply, in their order."""
        self.replies: list[Reply] = []
        """In the same order."""
        self._asked = self._spent = 0
        self._open: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def answer(self, asked: Asked) -> Reply:
        """Return the model's reply to a request; it is trained on.

        Raises:
            Refusal: a limit is reached, the chat template has no words for the messages, or an engine failed.
            asyncio.CancelledError: the episode is over.
        """
        if self._closed:  # while the request was read
            raise asyncio.CancelledError
        task = asyncio.ensure_future(self._answer(asked))
        self._open.add(task)
        try:
            return await task
        except Refusal as refusal:
            self.refusal = str(refusal)
            raise
        except Exception as error:
            if not self.broken.done():
                self.broken.set_exception(error)
            raise Refusal("the server has failed", status=500, code="server_error") from error
        finally:
            task.cancel()
            self._open.discard(task)

    def close(self) -> None:
        """Answer nothing more."""
        self._closed = True
        for task in self._open:
            task.cancel()
        if self.broken.done():
            self.broken.exception()  # whoever has waited for it has heard
        self.broken.cancel()

    async def _answer(self, asked: Asked) -> Reply:
        replies = len(self.replies) + sum(thread.busy for thread in self._threads)
        if replies == self._limits.max_turns:
            raise self._over(Stop.TURNS, f"has had its {replies} replies ({self._key}.max_turns)")
        try:
            thread = self._going_on(asked) or self._begun(asked)
        except UserError as error:
            raise Refusal(str(error)) from error
        conversation = thread.conversation
        prompt = conversation.next_prompt
        most = min(self._limits.max_tokens - self._spent, self._config.max_sequence_tokens - len(prompt))
        if most < 1:
            raise self._over(
                Stop.LENGTH,
                f"has no room for a reply: it has {self._spent} tokens of {self._key}.max_tokens="
                f"{self._limits.max_tokens}, and a prompt of {len(prompt)}",
            )
        self._asked += 1
        thread.busy = True
        if thread not in self._threads:
            self._threads.append(thread)
        try:
            with self._waiting():  # for nothing else: who asks in vain for ever is killed
                completion = await self._ask(prompt, min(most, asked.most or most), self._asked)
        except BaseException:
            if thread not in self._spoken:  # it begins anew where the same is asked again
                self._threads.remove(thread)
            raise
        finally:
            thread.busy = False  # who gave up or was refused may ask the same again
        message = conversation.reply(completion.token_ids, completion.logps, completion.truncated)
        thread.said.append(said(message))
        thread.owed = False
        self._spoken.append(thread)
        self._spent += len(completion.token_ids)
        self.tool_calls += len(message.get("tool_calls", [])) + bool(asked.tools and conversation.problem)
        self.tool_failures += bool(asked.tools and conversation.problem)
        self.replies.append(Reply(message, completion.truncated, len(prompt), len(completion.token_ids)))
        return self.replies[-1]

    def _over(self, limit: Stop, why: str) -> Refusal:
        self.limit = self.limit or limit
        return Refusal(
            f"the episode {why}", code="context_length_exceeded" if limit is Stop.LENGTH else "turns_exceeded"
        )

    def _going_on(self, asked: Asked) -> _Thread | None:
        """The longest conversation of which the request is the next turn, with what is new appended.

        Where the model still owes it a reply, there is nothing new: the agent has to ask the same again.
        """
        known, template = [said(message) for message in asked.messages], self._templates.of(asked.tools)

        def fits(thread: _Thread) -> bool:
            length = len(thread.said)
            later = asked.messages[length:]
            same = not thread.busy and thread.conversation.template is template and known[:length] == thread.said
            return same and thread.owed != bool(later) and all(message["role"] != "assistant" for message in later)

        thread = max(filter(fits, reversed(self._threads)), key=lambda one: len(one.said), default=None)
        if thread is not None and not thread.owed:
            self._spent += thread.conversation.extend(asked.messages[len(thread.said) :])
            thread.said, thread.owed = known, True
        return thread

    def _begun(self, asked: Asked) -> _Thread:
        template, messages = self._templates.of(asked.tools), asked.messages
        try:
            ids = template.start(messages)
        except Refused:
            messages = as_users(messages)
            ids = template.start(messages)
        return _Thread(template.begin(ids, messages), [said(message) for message in asked.messages], len(messages))

    def rows(self) -> tuple[list[Row], list[Turn]]:
        """Return the rows of all conversations, and where the model wrote in them, in the order of its replies."""
        rows: list[Row] = []
        turns: dict[int, list[Turn]] = {}
        for thread in self._threads:
            own = thread.conversation.turns()
            turns[id(thread)] = [turn._replace(row=turn.row + len(rows)) for turn in own]
            rows += thread.conversation.rows() if own else []
        return rows, [turns[id(thread)].pop(0) for thread in self._spoken]

    def messages(self) -> list[tuple[list[Message], list[Message]]]:
        """Return each conversation's prompt and what was said after it; the one with the last reply at the end."""
        last = self._spoken[-1]
        heard = [thread for thread in self._threads if thread is not last and thread in self._spoken]
        found = [(thread.conversation.messages, thread.prompt) for thread in [*heard, last]]
        return [(messages[:prompt], messages[prompt:]) for messages, prompt in found]
