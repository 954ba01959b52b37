"""One episode: a prompt, then replies of the model and answers to them, until one of them ends it."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from sapo_rl.config import ENVIRONMENT, Config
from sapo_rl.engines.base import Completion, Request, Sampling
from sapo_rl.environments.chat import ChatTemplate, Conversation
from sapo_rl.environments.messages import Message
from sapo_rl.environments.runner.pool import EnvironmentPool, Seat
from sapo_rl.environments.runner.process import EnvironmentFailed, WorkerLost
from sapo_rl.errors import UserError
from sapo_rl.rollout.collector import seed_of
from sapo_rl.rollout.dispatch import Answer, Session
from sapo_rl.types import Messages, Prompt, Row, Sample, Stop, Turn

Submit: TypeAlias = Callable[[Request, Sampling, Session, bool], Future[Answer]]
"""Asks the engines for one reply; the requests of a session stay with one of them; the last says whether it hurries."""
MOST_LOSSES = 5
"""Times that an episode is begun anew because its process ended and no call is to blame."""


@dataclass(frozen=True)
class Setting:
    """What the episodes of an environment have in common."""

    config: Config
    name: str
    """Of the environment, in `config.played`."""
    template: ChatTemplate
    environment: EnvironmentPool
    submit: Submit
    states: bool = False
    """Whether reward functions ask for the environments that were played."""


@dataclass
class Course:
    """What has happened in an episode so far."""

    rewards: list[float] = field(default_factory=list)
    """By turn, where the environment answers replies."""
    parts: dict[str, float] = field(default_factory=dict)
    """Of its reward at the end, by name, where it has several."""
    tool_calls: int = 0
    """Malformed ones included."""
    tool_failures: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    """What the environment told last."""
    state: dict[str, Any] | None = None
    """The environment's own at the end, where reward functions ask for it."""
    answers: list[Answer] = field(default_factory=list)
    """The engines', a turn each."""
    sent: int = 0
    """Tokens of the prompts of all turns."""


class Episode:
    """Plays one episode.

    Args:
        setting: of the run.
        prompt: what it begins with.
        step: the rollout batch that it is for.
        number: which of the prompt's episodes it is.
        sampling: how replies are drawn.
        urgent: whether its requests go before those of others.
    """

    def __init__(
        self, setting: Setting, prompt: Prompt, step: int, number: int, sampling: Sampling, urgent: bool = False
    ) -> None:
        self._setting, self._prompt, self._sampling, self._urgent = setting, prompt, sampling, urgent
        self._seed = (setting.config.seed, step, prompt.index)
        # All episodes of a group face one task, and so do all evaluations of a prompt, whose steps are below 1.
        self._task = seed_of(setting.config.seed, max(0, step), prompt.index)
        self._number = number
        self.course = Course()

    async def play(self) -> Sample:
        """Play to the end, and anew from the beginning where the environment's process is lost.

        Raises:
            EnvironmentFailed: its code raised or answered what cannot be, or has taken two processes down, one of them
                with no other episode's call under way, or they end again and again without a call that is to blame.
            UserError: the prompt is too long with what the environment adds, or the chat template refuses a message.
        """
        pool, suspected, blameless = self._setting.environment, 0, 0
        while True:
            try:
                async with await pool.seat() if suspected < 2 else pool.apart() as seat:
                    return await self._play(seat)
            except WorkerLost as lost:
                suspected += lost.suspect
                blameless += not lost.suspects
                if suspected >= 2 and lost.suspect and lost.suspects == 1:
                    raise EnvironmentFailed(str(lost)) from lost
                if blameless == MOST_LOSSES:
                    why = "is something else ending it, for want of memory perhaps?"
                    raise EnvironmentFailed(f"{lost}; {blameless} times with no call under way: {why}") from lost

    async def _play(self, seat: Seat) -> Sample:
        self.course, session = Course(), Session()
        conversation, limits = await self._begin(seat), self._setting.environment.cfg
        room, shown = limits.max_tokens, len(conversation.messages)
        shown -= conversation.messages[-1]["role"] == "assistant"  # it is the reply's beginning
        opening = conversation.messages[:shown]
        told: list[Message] = []
        for turn in itertools.count(1):
            completion = await self._ask(conversation.next_prompt, room, turn, session)
            message = conversation.reply(completion.token_ids, completion.logps, completion.truncated)
            told, stop = await self._respond(seat, conversation, message)
            if stop is None and turn == limits.max_turns:
                stop = Stop.TURNS
            elif stop is Stop.STOP and completion.truncated:
                stop = Stop.LENGTH
            if stop is None:
                room -= len(completion.token_ids) + conversation.extend(told)
                told = []
                stop = None if room > 0 else Stop.LENGTH
            if stop is not None:
                messages = [*conversation.messages[shown:], *told]
                return await self._sample(seat, conversation, opening, messages, stop)
        raise AssertionError

    async def _begin(self, seat: Seat) -> Conversation:
        setting, content = self._setting, self._prompt.content
        row = self._prompt.columns | {"prompt": content}
        opening = await seat.reset(row, self._task)
        messages = opened(content, setting.config.data.system_prompt, opening)
        token_ids = setting.template.start(messages)
        if len(token_ids) > (most := setting.config.max_prompt_tokens):
            raise UserError(
                f"data.max_prompt_tokens: prompt {self._prompt.index} has {len(token_ids)} tokens with its tools and "
                f"what the environment adds; the limit is {most}"
            )
        return setting.template.begin(token_ids, messages)

    async def _ask(self, prompt: list[int], room: int, turn: int, session: Session) -> Completion:
        seed = seed_of(*self._seed, self._number, turn) if self._setting.config.reproducible else None
        sampling = replace(self._sampling, max_tokens=min(room, self._sampling.max_tokens))
        answer = await asyncio.wrap_future(
            self._setting.submit(Request(prompt, 1, seed), sampling, session, self._urgent)
        )
        self.course.answers.append(answer)
        self.course.sent += len(prompt)
        return answer.completions[0]

    async def _respond(
        self, seat: Seat, conversation: Conversation, message: Message
    ) -> tuple[list[Message], Stop | None]:
        """Return what is said to a reply, and why the episode ends with it, if it does."""
        course, stop = self.course, None
        if conversation.problem and self._setting.template.tools:
            course.tool_calls += 1
            course.tool_failures += 1
            return [{"role": "tool", "content": conversation.problem}], None
        told: list[Message] = []
        for call in message.get("tool_calls", []):
            function = call["function"]
            answer = await seat.use(function["name"], function["arguments"])
            course.tool_calls += 1
            course.tool_failures += answer.failed
            stop = Stop.ENVIRONMENT if answer.done else stop
            told.append({"role": "tool", "tool_call_id": call["id"], "name": function["name"], "content": answer.text})
        if told:
            return told, stop
        if not self._setting.environment.steps:
            return [], Stop.STOP
        step = await seat.step(message["content"])
        course.rewards.append(step.reward)
        course.info = step.info
        return step.messages, Stop.ENVIRONMENT if step.done else None

    async def _sample(
        self, seat: Seat, conversation: Conversation, opening: list[Message], messages: list[Message], stop: Stop
    ) -> Sample:
        own, self.course.parts, self.course.state = await seat.end(self._setting.states)
        parts = [*self.course.rewards, *([] if own is None else [own])]
        rows, turns, reward = conversation.rows(), conversation.turns(), sum(parts) if parts else None
        return self._made(rows, turns, opening, messages, transcript(messages), stop, reward, seat.seconds)

    def _made(
        self,
        rows: list[Row],
        turns: list[Turn],
        opening: list[Message],
        messages: list[Message],
        text: str,
        stop: Stop,
        reward: float | None,
        seconds: float,
    ) -> Sample:
        """Put an episode together that has ended."""
        course, rewarded = self.course, ENVIRONMENT in self._setting.config.rewards
        named = {f"{ENVIRONMENT}/{name}": part for name, part in course.parts.items()}
        return Sample(
            rows,
            stop,
            (min(one.oldest_version for one in course.answers), max(one.newest_version for one in course.answers)),
            turns,
            text,
            messages=messages,
            opening=opening,
            info={
                "environment": self._setting.name,
                "rewards": course.rewards,
                "told": course.info,
                "state": course.state,
                "tool_calls": course.tool_calls,
                "tool_failures": course.tool_failures,
                "seconds": seconds,
                "sent": course.sent,
                "cached": sum(one.completions[0].cached for one in course.answers),
            },
            rewards={ENVIRONMENT: reward, **named} if rewarded else {},
        )


def opened(content: str | Messages, system_prompt: str | None, opening: str | list[Message] | None) -> list[Message]:
    """Return the messages of a prompt with what `reset` adds: messages after it, or text to its end."""
    if isinstance(content, str):
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        messages = [*system, {"role": "user", "content": content}]
    else:
        messages = [dict(message) for message in content]
    if isinstance(opening, str):
        messages[-1]["content"] += opening
        return messages
    return [*messages, *(opening or [])]


def transcript(messages: Sequence[Message]) -> str:
    """Return what was said for human eyes: the role and the words of each message, calls of tools as JSON."""
    paragraphs = []
    for message in messages:
        calls = [json.dumps(call["function"]) for call in message.get("tool_calls", [])]
        paragraphs.append("\n".join(filter(None, [f"{message['role']}: {message['content']}", *calls])))
    return "\n\n".join(paragraphs)
