"""What an environment is: two shapes of class, told apart by their methods, played by one contract.

A class with `step(reply)` answers each reply of the model, as a gym does. One without it is TRL's shape: its other
public methods are tools that the model may call. Methods may be coroutines. An object is made for every episode.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from sapo_rl.environments.endpoint import Endpoint
from sapo_rl.environments.tools import call, tools_of, tools_of_object
from sapo_rl.errors import UserError
from sapo_rl.errors.own_code import is_dict, is_list, is_mapping, is_tuple, line_of, number_of, shown, told
from sapo_rl.plugins import NAMED, accepted, parameters_of
from sapo_rl.types import LARGEST_REWARD

LARGEST_ATTRIBUTE = 2**16
"""Bytes of an environment's attribute, as JSON, that reward functions may see."""

Answer: TypeAlias = dict[str, Any]
"""What a call of an environment answers, as JSON holds it."""


class Failure(Exception):
    """A failed environment; the message is the cause, with file and line where they are known."""


class Kind:
    """The environments of a run: how one is made, of which shape it is, and which tools there are.

    Args:
        name: what the config calls it, for messages.
        make: the class, or a function that makes the object of an episode; None where there are tools alone.
        args: what it is called with.
        functions: the tools of the config.

    Raises:
        UserError: the object is of neither shape, or a tool cannot be described.
    """

    def __init__(
        self,
        name: str | None,
        make: Callable[..., Any] | None,
        args: Mapping[str, Any],
        functions: Sequence[Callable[..., Any]],
    ) -> None:
        self.name = name
        self._make, self._args = make, args
        self.tools = tools_of(functions)
        """All tools by name; those that are methods, of an object that was made to be looked at."""
        self.methods: list[str] = []
        """Names of the object's own tools."""
        self.runs = False
        """Whether it is an agent that asks the model by itself."""
        self.steps = self.rewards = self.takes_seed = False
        """Whether it answers each reply itself, whether it rewards, and whether `reset` takes a `seed`."""
        self.needs: list[str] = []
        """Columns without which an episode cannot begin."""
        if make is not None:
            self._look_at(make(**args))

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """What the model is told of the tools, as OpenAI's API has it."""
        return [tool.schema for tool in self.tools.values()]

    def begin(self) -> Play:
        """Make the object of an episode. Raises Failure where that fails."""
        if self._make is None:
            return Play(self, None)
        try:
            return Play(self, self._make(**self._args))
        except BaseException as error:
            raise Failure(f"making it: {told(error)}{line_of(None, error)}") from error

    def _look_at(self, target: Any) -> None:
        if isinstance(target, Endpoint):
            self.runs, self.rewards, self.needs, self.tools = True, True, list(target.needs), {}  # tools are its own
            return
        if not callable(getattr(target, "reset", None)):
            raise UserError(f"environment '{self.name}' has no method reset")
        parameters = parameters_of(target.reset).values()
        named = [one for one in parameters if one.kind in NAMED]
        self.takes_seed = any(one.name == "seed" for one in named)
        self.needs = [one.name for one in named if one.default is one.empty and one.name not in ("seed", "prompt")]
        self.steps = callable(getattr(target, "step", None))
        self.rewards = self.steps or callable(getattr(target, "get_reward", None))
        if self.steps:
            return
        own = tools_of_object(target)
        if not own and not self.tools:
            raise UserError(f"environment '{self.name}' has neither a method step nor one that is a tool")
        self.methods, self.tools = list(own), self.tools | own


class Play:
    """One episode of an environment. Every method raises Failure where the user's code does, or answers what cannot be.

    Args:
        kind: what is played.
        own: its object; None for tools alone.
    """

    def __init__(self, kind: Kind, own: Any) -> None:
        self.kind, self.own = kind, own
        methods = {name: kind.tools[name]._replace(function=getattr(own, name)) for name in kind.methods}
        self.tools = kind.tools | methods

    async def reset(self, row: dict[str, Any], seed: int) -> Answer:
        """Begin with a row's columns; answer `opening`: messages after the prompt, or text added to it, or None."""
        if self.own is None:
            return {"opening": None}
        given = {**row, "seed": seed} if self.kind.takes_seed else row
        found = await self._call("reset", **accepted(self.own.reset, given))
        if is_tuple(found) and len(found) == 2:  # Gymnasium's: an observation and info
            found = found[0]
        if found is not None and not isinstance(found, str):
            found = _messages(found, "reset")
        return {"opening": found}

    async def step(self, reply: str) -> Answer:
        """Answer a reply: `messages` to the model, `reward`, `done` and `info`."""
        found = await self._call("step", reply)
        if not is_tuple(found) or len(found) not in (3, 4, 5):
            raise self._wrong("step", found, "(observation, reward, done) or (observation, reward, done, info)")
        if len(found) == 5:  # Gymnasium's: terminated and truncated
            found = (*found[:2], found[2] or found[3], found[4])
        seen, reward, done, *info = found
        if seen in (None, []) and not done:
            raise Failure(f"step returned no observation and not done{line_of(self.own.step)}")
        messages = [] if seen is None else [{"role": "user", "content": seen}] if isinstance(seen, str) else seen
        return {
            "messages": _messages(messages, "step"),
            "reward": self._number("step", reward),
            "done": bool(done),
            "info": info[0] if info else {},
        }

    async def use(self, name: str, arguments: dict[str, Any]) -> Answer:
        """Call a tool for the model: `text` is what it is told, `failed` whether the call was in vain."""
        outcome = await call(self.tools, name, arguments)
        done = getattr(self.own, "done", False)
        return {"text": outcome.text, "failed": outcome.failed, "done": bool(done) and not callable(done)}

    async def run(self, row: dict[str, Any], seed: int, url: str, key: str) -> Answer:
        """Have an agent play, which asks the model at `url` with `key`; answer its `reward`."""
        try:
            found = await self.own.play({"seed": seed, **row}, url, key)
        except BaseException as error:
            raise Failure(f"run: {told(error)}{line_of(self.own.run, error)}") from error
        return {"reward": self._number("run", found)}

    async def end(self, with_state: bool = False) -> Answer:
        """Close it; `reward` is what `get_reward` says, the sum where it has several, None where there is none.

        `parts` are these several, by name. `state` is, where asked for, what `state_of` finds before.
        """
        reward, parts = None, dict[str, float]()
        try:
            if callable(getattr(self.own, "get_reward", None)):
                found = await self._call("get_reward")
                if is_mapping(found):
                    parts = {str(name): self._number("get_reward", part) for name, part in found.items()}
                reward = sum(parts.values()) if is_mapping(found) else self._number("get_reward", found)
            state = {"state": state_of(self.own)} if with_state and self.own is not None else {}
        finally:
            await self.close()
        return {"reward": reward, "parts": parts, **state}

    async def close(self) -> Answer:
        """Call `close`, where there is one."""
        if callable(getattr(self.own, "close", None)):
            await self._call("close")
        return {}

    async def _call(self, name: str, *given: Any, **named: Any) -> Any:
        method = getattr(self.own, name)
        try:
            found = method(*given, **named)
            return await found if inspect.isawaitable(found) else found
        except BaseException as error:
            raise Failure(f"{name}: {told(error)}{line_of(method, error)}") from error

    def _number(self, name: str, found: Any) -> float:
        number = number_of(found, LARGEST_REWARD)
        if number is None:
            raise self._wrong(name, found, "a finite number as its reward")
        return number

    def _wrong(self, name: str, found: Any, valid: str) -> Failure:
        place = line_of(getattr(self.own, name))
        return Failure(f"{name} returned {shown(found)}; must return {valid}{place}")


def _messages(found: Any, name: str) -> list[dict[str, Any]]:
    """Messages with the texts role and content."""
    if not is_list(found) or not all(map(_is_message, found)):
        raise Failure(f"{name} returned {shown(found)}; must be text, or messages with the texts role and content")
    return [{"role": message["role"], "content": message["content"]} for message in found]


def _is_message(found: Any) -> bool:
    return is_dict(found) and all(isinstance(found.get(key), str) for key in ("role", "content"))


def state_of(own: Any) -> dict[str, Any]:
    """Return the public attributes and properties of an object that JSON can hold in `LARGEST_ATTRIBUTE` bytes each."""
    properties = inspect.getmembers_static(own.__class__, lambda one: isinstance(one, property))
    named = [*getattr(own, "__dict__", {}), *(name for name, _ in properties)]
    state: dict[str, Any] = {}
    for name in named:
        if name.startswith("_"):
            continue
        try:
            value = getattr(own, name)
            if len(json.dumps(value, allow_nan=False)) <= LARGEST_ATTRIBUTE:
                state[name] = value
        except Exception:  # a property of the user's may raise anything; what JSON cannot hold is left out
            continue
    return state


def as_json(answer: Answer) -> bytes:
    """Return a line of JSON. Raises Failure where something in the answer has no place in it."""
    try:
        return json.dumps(answer, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise Failure(f"info holds what JSON does not: {error}") from error
