"""A tool with which the model runs Python programs of its own."""

from __future__ import annotations

from typing import Any

from sapo_rl.environments.registry import ENVIRONMENTS
from sapo_rl.environments.turns import in_turn
from sapo_rl.processes.sandbox import Job, Limits, Sandbox, check, reach, room, run


@ENVIRONMENTS.register_module("python")
class Python:
    r"""Lets the model run programs in a sandbox; rewards are left to the reward functions.

    Args:
        cpu_seconds: computing time of a program.
        memory_mb: its memory, in units of 2^20 bytes.
        most: characters of what it printed that the model is shown, from the end.
        at_once: programs that run at the same time in each of `environment.workers` processes; others wait, which
            `environment.turn_timeout` does not count. None takes as many as there are processors; a service bounds
            them by itself.
        sandbox: `bubblewrap`, `none` for limits alone, or `{url: ...}` of a service, as `code` takes it.

    Raises:
        ValueError: unusable settings, a machine without bubblewrap, or a service that runs no program.

    Example:
        >>> asyncio.run(Python().python("print(6 * 7)"))
        '42\n'
    """

    def __init__(
        self,
        cpu_seconds: int = 5,
        memory_mb: int = 512,
        most: int = 2000,
        sandbox: str | dict[str, Any] = "bubblewrap",
        at_once: int | None = None,
    ) -> None:
        if most < 1 or (at_once is not None and at_once < 1):
            raise ValueError(f"most is {most} and at_once is {at_once}, must be at least 1")
        self._limits, self._most = Limits.of(cpu_seconds, memory_mb), most
        self._sandbox: Sandbox = check(sandbox)
        reach(self._sandbox)
        self._at_once = at_once

    def reset(self) -> None:
        """Keep nothing: each program begins anew."""

    async def python(self, code: str) -> str:
        """Run a Python program and return what it printed. Nothing is kept from one call to the next.

        Args:
            code: The program; use print to see a value.

        Returns:
            What it printed.
        """
        async with in_turn(room(self._sandbox, self._at_once)):
            result = await run(Job(code), self._limits, self._sandbox)
        printed = result.stdout + result.stderr
        if result.stopped == "output":
            printed += "\n(stopped: it printed too much)"
        elif result.exit_code > 128:
            printed += f"\n(stopped: it took longer than {self._limits.cpu_seconds} seconds, or crashed)"
        return printed[-self._most :] or "(it printed nothing)"
