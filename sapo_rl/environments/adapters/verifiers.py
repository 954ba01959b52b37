"""Tasksets of verifiers (0.4 or newer): its agent plays a task and asks the trained model, its rewards judge."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Generator
from typing import Any, ClassVar

from sapo_rl import plugins
from sapo_rl.environments.adapters import package
from sapo_rl.environments.endpoint import Endpoint, reach_this_machine
from sapo_rl.environments.registry import ENVIRONMENTS
from sapo_rl.errors import UserError

NAME = "verifiers"
INDEX = "task_index"
"""Column that says which task of the taskset a row is."""


@ENVIRONMENTS.register_module(NAME)
class Verifiers(Endpoint):
    """Has verifiers' agent play the task that a row names; the trace's reward is the episode's.

    Args:
        taskset: the module that exports the taskset, of yours or an installed package.
        settings: the taskset's config.
        harness: verifiers' program that talks to the model, by its id; `chat` asks once, in this process.
        runtime: where other programs run, as verifiers has it.

    Raises:
        UserError: no package verifiers, or no such taskset.
    """

    needs: ClassVar[tuple[str, ...]] = (INDEX,)

    def __init__(
        self,
        taskset: str,
        settings: dict[str, Any] | None = None,
        harness: str = "chat",
        runtime: dict[str, Any] | None = None,
    ) -> None:
        self._tasks = _tasks_of(taskset, json.dumps(settings or {}))
        self._harness, self._runtime = harness, runtime or {"type": "subprocess"}
        self.run = self._run
        reach_this_machine()

    async def play(self, row: dict[str, Any], url: str, key: str) -> float:
        """Return the reward of the row's task."""
        if not isinstance(row[INDEX], int):
            raise TypeError(f"the row's {INDEX} is {row[INDEX]!r}, must be the number of a task")
        with _in_environment(key) as variable:
            return await self._run(self._tasks.at(row[INDEX]), url, variable)

    async def _run(self, task: Any, url: str, variable: str) -> float:
        vf = package("verifiers.v1", NAME)
        agent = vf.make_agent(
            vf.AgentConfig(
                harness={"id": "null" if self._harness == "chat" else self._harness},
                runtime=self._runtime,
                model="policy",
                client=vf.EvalClientConfig(base_url=url, api_key_var=variable),
            )
        )
        if self._harness == "chat":
            agent.harness = _chat()(agent.config.harness)
        trace = await agent.run(task)
        if not trace.ok:
            raise RuntimeError("; ".join(f"{error.type}: {error.message}" for error in trace.errors))
        return float(trace.reward)


class _Tasks:
    """The tasks of a taskset, which may have no end, made as they are asked for."""

    def __init__(self, taskset: Any) -> None:
        self._left, self._made = iter(taskset), list[Any]()

    def at(self, index: int) -> Any:
        self._made += itertools.islice(self._left, max(0, index + 1 - len(self._made)))
        if index >= len(self._made):
            raise IndexError(f"{INDEX} is {index}, and the taskset has {len(self._made)} tasks")
        return self._made[index]


@functools.cache
def _tasks_of(taskset: str, settings: str) -> _Tasks:
    vf = package("verifiers.v1", NAME)
    plugins.import_from_here()
    try:
        config = vf.taskset_config_type(taskset)(id=taskset, **json.loads(settings))
        return _Tasks(vf.load_taskset(config))
    except Exception as error:  # by the user's module or the config's schema
        raise UserError(f"environment '{NAME}': taskset '{taskset}': {type(error).__name__}: {error}") from error


@functools.cache
def _chat() -> type[Any]:
    """The harness that sends the task's prompt and takes the answer for the result."""
    from openai import AsyncOpenAI

    vf, runtimes = package("verifiers.v1", NAME), package("verifiers.v1.runtimes", NAME)

    class Chat(vf.Harness[vf.HarnessConfig]):
        APPENDS_SYSTEM_PROMPT = True
        EXECUTES_CODE = NEEDS_CONTAINER = False

        async def launch(
            self,
            ctx: Any,
            trace: Any,
            runtime: Any,
            endpoint: str,
            secret: str,
            mcp_urls: dict[str, str],
            data: Any,
            tool_interception_url: str | None = None,
        ) -> Any:
            system, prompt = self.resolve_prompt(data)
            messages: list[Any] = [{"role": "system", "content": system}] if system else []
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
            messages += [one if isinstance(one, dict) else one.model_dump(exclude_none=True) for one in asked]
            async with AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0, timeout=None) as client:
                said = await client.chat.completions.create(model=ctx.model, messages=messages)
            return runtimes.ProgramResult(0, said.choices[0].message.content or "", "")

    return Chat


_numbers = itertools.count()


@contextlib.contextmanager
def _in_environment(key: str) -> Generator[str]:
    """Have a key under an environment variable, from which alone verifiers takes one; its name."""
    variable = f"SAPO_EPISODE_{next(_numbers)}"
    os.environ[variable] = key
    try:
        yield variable
    finally:
        del os.environ[variable]


def tasks(split: str, taskset: str, count: int = 256, settings: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return rows for the first `count` tasks of a taskset, fewer where it ends; a source of data.

    Every eighth is for `eval_split` alone.
    """
    found = _tasks_of(taskset, json.dumps(settings or {}))
    rows: list[dict[str, Any]] = []
    for index in range(count):
        try:
            data = found.at(index).data
        except IndexError:
            break
        if (index % 8 == 7) is (split != "train"):
            rows.append({"prompt": data.prompt_text or f"Task {index}.", INDEX: index})
    return rows
