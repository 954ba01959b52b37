"""Prompts in, groups of episodes out: many of them at a time, between the engines and the environments of a rank."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from sapo_rl.config import Config
from sapo_rl.engines.base import Sampling
from sapo_rl.environments import environment_for
from sapo_rl.environments.chat import ChatTemplate
from sapo_rl.environments.runner.pool import EnvironmentPool
from sapo_rl.environments.runner.process import EnvironmentFailed
from sapo_rl.errors import UserError
from sapo_rl.processes import allow_connections
from sapo_rl.rollout.agents.episode import AgentEpisode
from sapo_rl.rollout.agents.server import AgentServer
from sapo_rl.rollout.agents.talk import Templates
from sapo_rl.rollout.collector import RolloutResult, Rollouts, usage_of
from sapo_rl.rollout.dispatch import Answer
from sapo_rl.rollout.episode import Episode, Setting
from sapo_rl.types import Group, Prompt, Sample

T = TypeVar("T")


class Episodes:
    """Plays episodes with the weights that the engines hold; a context manager, whose exit ends the environments.

    It is asked as `Rollouts` is. All episodes of a call are under way at once, in an event loop of a thread of its own;
    each turn is a request of its own, so that an engine never waits for an environment while another episode has
    something to ask.

    Args:
        rollouts: asks the engines.
        environments: play the other part; each by its name in `config.played`.
        config: the run's.
    """

    def __init__(
        self, rollouts: Rollouts, environments: Mapping[str, EnvironmentPool], config: Config, states: bool = False
    ) -> None:
        self._rollouts, self._environments, self._config, self._states = rollouts, environments, config, states
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="episodes", daemon=True)
        self._server = AgentServer(config.rollout)
        self._players: dict[str, Callable[..., Episode]]

    def __enter__(self) -> Episodes:
        """Start the environments. Raises UserError where they cannot be imported or do not suit the config."""
        self._thread.start()
        try:
            self._wait(self._open())
            self._players = {name: self._player(name, pool) for name, pool in self._environments.items()}
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the environments, and every episode that is under way."""
        self._wait(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def write(
        self,
        prompts: Sequence[Prompt],
        step: int,
        n: int | None = None,
        on_group: Callable[[Group], object] = lambda group: None,
        sampling: Sampling | None = None,
    ) -> RolloutResult:
        """Play `n` episodes of each prompt, see `Writer.write`; several threads may call it.

        A group of which every episode was dropped stays, without samples. `on_group` is called in the thread of the
        episodes.

        Raises:
            UserError: an environment failed where `environment.on_error` is `raise`.
        """
        count, urgent = n or self._rollouts.group_size, sampling is not None
        return self._wait(self._write(prompts, step, count, sampling or self._rollouts.sampling, on_group, urgent))

    def sleep(self) -> None:
        """Have the engines free the GPU's memory, as far as their settings say, until the next call or weights."""
        self._rollouts.sleep()

    def _player(self, name: str, pool: EnvironmentPool) -> Callable[..., Episode]:
        """What makes an episode of an environment, of the other arguments of `Episode`."""
        template = ChatTemplate(
            self._rollouts.tokenizer,
            tools=pool.schemas or None,
            parser=self._config.rollout.tool_parser,
            arguments=self._config.data.chat_template_args,
        )
        setting = Setting(self._config, name, template, pool, self._rollouts.submit, self._states)
        if not pool.runs:
            return partial(Episode, setting)
        templates = Templates(template, self._config.rollout.tool_parser)
        return partial(AgentEpisode, setting, server=self._server, templates=templates)

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _open(self) -> None:
        allow_connections()  # an episode may hold one to its agent, or its environment one to a server
        await asyncio.gather(*(pool.open() for pool in self._environments.values()))
        if any(pool.runs for pool in self._environments.values()):
            await self._server.open()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task(), self._server.serving}
        for task in others:  # first: an episode that loses its process would take another
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.gather(self._server.close(), *(pool.close() for pool in self._environments.values()))

    async def _write(
        self,
        prompts: Sequence[Prompt],
        step: int,
        n: int,
        sampling: Sampling,
        on_group: Callable[[Group], object],
        urgent: bool,
    ) -> RolloutResult:
        start, failures = time.perf_counter(), []
        answers: list[Answer] = []

        async def play(prompt: Prompt, number: int) -> Sample | None:
            name = environment_for(self._config, prompt.columns, prompt.index)
            episode = self._players[name](prompt, step, number, sampling, urgent)
            try:
                return await episode.play()
            except EnvironmentFailed as error:
                failures.append(_told(self._environments[name], prompt, error))
                return None
            finally:
                answers.extend(episode.course.answers)

        async def group(prompt: Prompt) -> Group:
            async with asyncio.TaskGroup() as tasks:
                playing = [tasks.create_task(play(prompt, number)) for number in range(n)]
            finished = Group(prompt, [sample for one in playing if (sample := one.result()) is not None])
            on_group(finished)
            return finished

        try:
            async with asyncio.TaskGroup() as tasks:
                playing = [tasks.create_task(group(prompt)) for prompt in prompts]
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        groups = [one.result() for one in playing]
        return RolloutResult(groups, usage_of(answers, start, len(self._rollouts.engines)), failures)


def _told(pool: EnvironmentPool, prompt: Prompt, error: EnvironmentFailed) -> str:
    """Say what failed, or end all with it."""
    text = f"{pool.named} failed on prompt {prompt.index}: {error}"
    if pool.cfg.on_error == "raise":
        raise UserError(f"{text}; {pool.key}.on_error=drop leaves such episodes out") from error
    return text


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first of the errors that groups of tasks have wrapped."""
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
