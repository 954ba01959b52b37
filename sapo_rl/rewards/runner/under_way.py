"""The calls that one worker is at: how many it may take, what its answers say of them, and which are late."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sapo_rl.config import RewardFunctionConfig
from sapo_rl.errors.own_code import readable
from sapo_rl.rewards.registry import Score, calls_at_once
from sapo_rl.rewards.runner.blame import Call, Outcome
from sapo_rl.types import LARGEST_REWARD


@dataclass(slots=True)
class Task:
    """A call that a worker is at."""

    call: Call
    limit: float
    """Seconds that it may take."""
    deadline: float
    """When it is to be cancelled or, where it was, given up, on the monotonic clock."""
    cancelled: bool = False

    @property
    def cause(self) -> str:
        """What happened, where it was too late."""
        return f"took longer than {self.limit:g} s"


class UnderWay:
    """Keeps the calls that a worker is at: several of coroutine functions, or one of another.

    A further call waits until the worker has acknowledged the last one: then it reads what it is sent.
    """

    def __init__(self, functions: Mapping[str, RewardFunctionConfig]) -> None:
        self.coroutines: set[str] = set()
        """Names of the functions of which several calls can be under way."""
        self._functions = functions
        self._tasks: dict[int, Task] = {}
        self._last = 0
        self._unacknowledged: int | None = None

    @property
    def calls(self) -> list[Call]:
        """All calls, the oldest first."""
        return [task.call for task in self._tasks.values()]

    @property
    def deadline(self) -> float:
        """When the next call is late, on the monotonic clock; infinity where there is none."""
        return min((task.deadline for task in self._tasks.values()), default=math.inf)

    def room(self) -> Collection[str]:
        """Return the names of the functions of which another call can be added."""
        if not self._tasks:
            return self._functions.keys()
        counts = Counter(call.name for call in self.calls)
        alone = any(call.alone for call in self.calls) or not counts.keys() <= self.coroutines
        if alone or self._unacknowledged is not None:
            return ()
        return {name for name in self.coroutines if counts[name] < calls_at_once(self._functions[name])}

    def add(self, task: Task) -> int:
        """Add a call and return its number, which is 1 or more."""
        self._last += 1
        self._tasks[self._last] = task
        self._unacknowledged = self._last if task.call.name in self.coroutines else None
        return self._last

    def remove(self, number: int) -> None:
        """Take a call off, which has ended or has not begun."""
        del self._tasks[number]
        if number == self._unacknowledged:
            self._unacknowledged = None

    def clear(self) -> None:
        """Take off all calls."""
        self._tasks.clear()
        self._unacknowledged = None

    def late(self, now: float) -> dict[int, Task]:
        """Return the calls whose deadline is over, by number."""
        return {number: task for number, task in self._tasks.items() if now >= task.deadline}

    def understand(self, answer: dict[str, Any]) -> list[tuple[Call, Outcome]] | None:
        """Return the call that has ended by a worker's answer, if one has; None for what cannot be an answer."""
        number = answer.get("call")
        task = self._tasks.get(number) if type(number) is int else None
        if task is None or type(number) is not int:
            return None
        if answer.get("under_way") is True and number == self._unacknowledged:
            self._unacknowledged = None
            return []
        scores = _as_scores(answer.get("scores"), len(task.call.places))
        if isinstance(answer.get("failed"), str):
            outcome = Outcome(None, readable(answer["failed"]))
        elif answer.get("late") is True and task.cancelled:
            outcome = Outcome(None, task.cause, late=True)
        elif scores is not None:
            outcome = Outcome(scores)
        else:
            return None
        self.remove(number)
        return [(task.call, outcome)]


def _as_scores(found: Any, count: int) -> list[Score] | None:
    """Return what a worker answered as `count` scores; None where it is anything else."""
    if not isinstance(found, list) or len(found) != count or not all(map(_is_score, found)):
        return None
    return [one if one is None or isinstance(one, dict) else float(one) for one in found]


def _is_score(found: Any) -> bool:
    """Whether it is a `Score`; JSON has text alone as keys."""
    numbers: list[Any] = [*found.values()] if isinstance(found, dict) and "score" in found else [found]
    return all(one is None or (type(one) in (int, float) and abs(one) <= LARGEST_REWARD) for one in numbers)
