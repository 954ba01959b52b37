"""An episode that an agent plays: it asks the model whenever it likes, and says at the end how well it has done."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from sapo_rl.engines.base import Completion, Sampling
from sapo_rl.environments.runner.pool import Seat
from sapo_rl.environments.runner.process import EnvironmentFailed
from sapo_rl.rollout.agents.server import AgentServer
from sapo_rl.rollout.agents.talk import Talk, Templates
from sapo_rl.rollout.dispatch import Session
from sapo_rl.rollout.episode import Course, Episode, Setting, transcript
from sapo_rl.types import Prompt, Sample, Stop


class AgentEpisode(Episode):
    """Plays one episode of an agent; the arguments are those of `Episode`, and the server that the agent asks.

    An agent that ends by an exception after a limit of the episode has refused it a reply has earned 0.
    """

    def __init__(
        self,
        setting: Setting,
        prompt: Prompt,
        step: int,
        number: int,
        sampling: Sampling,
        urgent: bool,
        server: AgentServer,
        templates: Templates,
    ) -> None:
        super().__init__(setting, prompt, step, number, sampling, urgent)
        self._server, self._templates = server, templates

    async def _play(self, seat: Seat) -> Sample:
        self.course, session = Course(), Session()

        async def ask(token_ids: list[int], room: int, turn: int) -> Completion:
            return await self._ask(token_ids, room, turn, session)

        pool = self._setting.environment
        talk = Talk(self._setting.config, pool.cfg, pool.key, self._templates, ask, seat.waiting)
        with self._server.admitted(talk) as key:
            reward = await self._run(seat, talk, key)
        if not self.course.answers:
            why = f"; it was refused: {talk.refusal}" if talk.refusal else ""
            raise EnvironmentFailed(f"run has not asked the model anything by the client that it got{why}")
        rows, turns = talk.rows()
        course, conversations = self.course, talk.messages()
        course.tool_calls, course.tool_failures = talk.tool_calls, talk.tool_failures
        cut = course.answers[-1].completions[0].truncated
        stop = talk.limit or (Stop.LENGTH if cut else Stop.ENVIRONMENT)
        course.rewards = [reward]
        text = "\n\n---\n\n".join(transcript(messages) for _, messages in conversations)
        made = self._made(rows, turns, *conversations[-1], text, stop, reward, seat.seconds)
        return replace(made, conversations=conversations) if len(conversations) > 1 else made

    async def _run(self, seat: Seat, talk: Talk, key: str) -> float:
        row: dict[str, Any] = self._prompt.columns | {"prompt": self._prompt.content}
        running = asyncio.ensure_future(seat.run(row, self._task, self._server.url, key))
        try:
            await asyncio.wait((running, talk.broken), return_when=asyncio.FIRST_COMPLETED)
            if talk.broken.done():
                talk.broken.result()
            return await running
        except EnvironmentFailed:
            if talk.limit is None:
                raise
            return 0.0
        finally:
            running.cancel()
