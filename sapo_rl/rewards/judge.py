"""Rewards by a language model that judges replies, behind any server with OpenAI's interface.

Settings of `judge`:
    url: of the server, with its version: `http://127.0.0.1:8000/v1`.
    model: the judge, as the server calls it.
    template: what it is asked; `{prompt}`, `{completion}` and columns of the data are filled in.
    system: a system message before that.
    low, high: the worst and the best number that it can say. `8/10` is 8 where high is 10.
    choices: words and what they pay; the last of them in the answer counts, instead of a number.
    field: the answer ends in a JSON object, of which this entry is the number.
    together: ask once for all replies of a prompt, with `{completions}` in the template; the answer ends in a JSON list
        of a number for each. It needs `scope: group`.
    votes: answers to each question; the reward is the mean of those that can be read.
    temperature, max_tokens: of its answers.
    extra: further entries of a request, such as vLLM's `structured_outputs` or `chat_template_kwargs`.
    key: the environment variable with the server's key, which has to stand in `reward.env` too.
    at_once: requests under way in each of `reward.workers` processes.
    requests_per_minute, tokens_per_minute: the most that such a process begins, or uses in questions and answers.
    retries: how often a request is sent again, after growing pauses, after a 429, a 5xx or a lost connection.
    answer_timeout: seconds for one answer.
    cache: a file that keeps answers that could be read, by what was asked; a resumed run asks nothing twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sapo_rl.config import RewardFunctionConfig
from sapo_rl.config.reward import key_of
from sapo_rl.errors import UserError
from sapo_rl.rewards.answers import Reading
from sapo_rl.rewards.registry import CHECKS, COLUMNS, PREPARATIONS, REWARD_FUNCTIONS, Completion

if TYPE_CHECKING:
    from openai import AsyncOpenAI

TEMPLATE = """\
Question:
{prompt}

Reply:
{completion}

How good is the reply, from 0 to 10? Give your reason in a sentence, then the number alone on the last line."""
TOGETHER = """\
Question:
{prompt}

{completions}

Compare the replies. End with a JSON list of a number from 0 to 10 for each of them, in their order."""
_FIELD = re.compile(r"\{(\w+)\}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MINUTE = 60.0


@REWARD_FUNCTIONS.register_module("judge")
async def judge(
    completions: list[Completion],
    prompts: list[Any],
    *,
    url: str,
    model: str,
    template: str | None = None,
    system: str | None = None,
    low: float = 0.0,
    high: float = 10.0,
    choices: dict[str, float] | None = None,
    field: str | None = None,
    together: bool = False,
    votes: int = 1,
    temperature: float = 0.0,
    max_tokens: int = 512,
    extra: dict[str, Any] | None = None,
    key: str | None = None,
    at_once: int = 64,
    requests_per_minute: float | None = None,
    tokens_per_minute: float | None = None,
    retries: int = 5,
    answer_timeout: float = 120.0,
    cache: str | None = None,
    **columns: list[Any],
) -> list[float | None]:
    """What a judge says of each reply: the last number of its answer, from `low` to `high`, as a share from 0 to 1.

    Raises:
        UserError: settings that cannot be.
        ValueError: an answer that cannot be read, or a field of the template that is no column.
        openai.APIError: the server gave no answer.
    """
    template = template or (TOGETHER if together else TEMPLATE)
    reading = Reading(low, high, choices, field, together)
    pace = _Limits(at_once, requests_per_minute, tokens_per_minute, retries, answer_timeout)
    asking = _Asking(url, model, system, temperature, max_tokens, json.dumps(extra or {}), key, cache, pace)
    _check(reading, asking, template, votes)
    if not completions:
        return []
    server = _server(asking)
    asked = [_filled(template, fields) for fields in _fields(completions, prompts, columns, together)]
    found = await asyncio.gather(*(_voted(server, text, reading, votes, len(completions)) for text in asked))
    return [*found[0]] if together else [value for (value,) in found]


def _fields(
    completions: list[Completion], prompts: list[Any], columns: Mapping[str, list[Any]], together: bool
) -> list[dict[str, Any]]:
    """What can stand in the template, for each question."""
    found = [
        {
            **{name: values[place] for name, values in columns.items()},
            "prompt": _shown(prompt),
            "completion": _shown(one),
        }
        for place, (prompt, one) in enumerate(zip(prompts, completions, strict=True))
    ]
    if not together:
        return found
    shown = (f"Reply {number}:\n{one['completion']}" for number, one in enumerate(found, start=1))
    return [{**found[0], "completions": "\n\n".join(shown)}]


@dataclass(frozen=True)
class _Limits:
    """How much is asked of a server."""

    at_once: int
    requests_per_minute: float | None
    tokens_per_minute: float | None
    retries: int
    answer_timeout: float


@dataclass(frozen=True)
class _Asking:
    """How a server is asked."""

    url: str
    model: str
    system: str | None
    temperature: float
    max_tokens: int
    extra: str
    key: str | None
    cache: str | None
    limits: _Limits


class _Server:
    """Asks a server, no faster than it may be, and keeps answers where there is a cache."""

    def __init__(self, asking: _Asking, client: AsyncOpenAI) -> None:
        self._asking, self._client = asking, client
        self._room = asyncio.Semaphore(asking.limits.at_once)
        self._requests = _Pace(asking.limits.requests_per_minute)
        self._tokens = _Pace(asking.limits.tokens_per_minute)
        self._cache = None if asking.cache is None else _Cache(asking.cache)

    async def ask(self, text: str, vote: int, read: Callable[[str], list[float]]) -> list[float]:
        """Return what `read` makes of the answer to a question; `vote` tells equal ones apart.

        Raises:
            ValueError: an answer that it cannot read, which is not kept.
        """
        asking = self._asking
        system = [] if asking.system is None else [{"role": "system", "content": asking.system}]
        body: dict[str, Any] = {
            "model": asking.model,
            "messages": [*system, {"role": "user", "content": text}],
            "temperature": asking.temperature,
            "max_tokens": asking.max_tokens,
            "extra_body": json.loads(asking.extra),
        }
        name = hashlib.sha256(json.dumps([asking.url, body, vote]).encode()).hexdigest()
        if self._cache is not None and (known := self._cache.get(name)) is not None:
            with contextlib.suppress(ValueError):  # it was read with other settings
                return read(known)
        async with self._room:
            await self._requests.take(1)
            await self._tokens.take(0)
            answer = await self._client.chat.completions.create(**body)
        self._tokens.note(answer.usage.total_tokens if answer.usage else 0)
        if not answer.choices:
            raise ValueError("the judge's server answered without choices")
        said = answer.choices[0].message.content or ""
        found = read(said)
        if self._cache is not None:
            self._cache.put(name, said)
        return found


class _Pace:
    """Spreads something evenly over a minute."""

    def __init__(self, per_minute: float | None) -> None:
        self._seconds = 0.0 if per_minute is None else _MINUTE / per_minute
        self._next = time.monotonic()

    async def take(self, count: int) -> None:
        """Wait for one's turn, and use `count` of it."""
        now = time.monotonic()
        turn = max(self._next, now)
        self._next = turn + count * self._seconds
        await asyncio.sleep(turn - now)

    def note(self, count: int) -> None:
        """Count what was used without asking before."""
        self._next = max(self._next, time.monotonic()) + count * self._seconds


class _Cache:
    """Answers on disk, which several processes share."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            with closing(self._open()) as file, file:
                file.execute("CREATE TABLE IF NOT EXISTS answers (name TEXT PRIMARY KEY, text TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise UserError(f"judge: the cache '{path}' cannot be written: {error}") from error

    def get(self, name: str) -> str | None:
        """Return an answer that is known."""
        with closing(self._open()) as file:
            row = file.execute("SELECT text FROM answers WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def put(self, name: str, text: str) -> None:
        """Keep an answer."""
        with closing(self._open()) as file, file:
            file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (name, text))

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=_MINUTE)


_SERVERS: dict[tuple[asyncio.AbstractEventLoop, _Asking], _Server] = {}


def _server(asking: _Asking) -> _Server:
    """The server for these settings, whose connections last as long as the event loop."""
    loop = asyncio.get_running_loop()
    if (loop, asking) not in _SERVERS:
        from openai import AsyncOpenAI

        client = AsyncOpenAI(
            base_url=asking.url,
            api_key=_secret(asking.key),
            max_retries=asking.limits.retries,
            timeout=asking.limits.answer_timeout,
        )
        _SERVERS[loop, asking] = _Server(asking, client)
    return _SERVERS[loop, asking]


async def _voted(server: _Server, text: str, reading: Reading, votes: int, count: int) -> list[float]:
    """The means of all votes that can be read."""
    problems: list[ValueError] = []

    async def ask(vote: int) -> list[float] | None:
        try:
            return await server.ask(text, vote, lambda said: reading.rewards(said, count))
        except ValueError as error:
            problems.append(error)
            return None

    found = [one for one in await asyncio.gather(*map(ask, range(votes))) if one is not None]
    if not found:
        raise problems[-1]
    return [sum(values) / len(values) for values in zip(*found, strict=True)]


def _check(reading: Reading, asking: _Asking, template: str, votes: int) -> None:
    """Raise UserError where settings cannot be."""
    limits, needed = asking.limits, "completions" if reading.together else "completion"
    ways = [reading.choices is not None, reading.field is not None, reading.together]
    rates = (limits.requests_per_minute, limits.tokens_per_minute, limits.answer_timeout)
    rules = (
        (asking.url.startswith(("http://", "https://")), f"url is '{asking.url}', must begin with http:// or https://"),
        (reading.low < reading.high, f"low is {reading.low:g}, must be below high, {reading.high:g}"),
        (reading.choices != {}, "choices is empty; it has words and what they pay"),
        (
            all(isinstance(one, str) and type(pay) in (int, float) for one, pay in (reading.choices or {}).items()),
            "choices must be words with a number each; put words that YAML takes for others (yes, no) in quotes",
        ),
        (asking.extra.startswith("{"), f"extra is {asking.extra}, must be entries of a request"),
        (sum(ways) <= 1, "only one of choices, field and together can be set"),
        (needed in _FIELD.findall(template), f"template does not hold {{{needed}}}"),
        (min(votes, limits.at_once, asking.max_tokens) > 0, "votes, at_once and max_tokens must be at least 1"),
        (limits.retries >= 0, f"retries is {limits.retries}, must be at least 0"),
        (
            all(one is None or one > 0 for one in rates),
            "requests_per_minute, tokens_per_minute and answer_timeout must be above 0",
        ),
        (asking.key is None or _VARIABLE.fullmatch(asking.key), "key must be the name of an environment variable"),
    )
    for holds, problem in rules:
        if not holds:
            raise UserError(f"judge: {problem}")


def _filled(template: str, fields: Mapping[str, Any]) -> str:
    def fill(found: re.Match[str]) -> str:
        if found[1] not in fields:
            raise ValueError(f"the template names '{found[1]}', which is no column; there are {', '.join(fields)}")
        return str(fields[found[1]])

    return _FIELD.sub(fill, template)


def _shown(said: str | Sequence[Mapping[str, Any]]) -> str:
    """A text, or a chat with its roles; one message of the assistant is its text."""
    if isinstance(said, str):
        return said
    if len(said) == 1 and said[0]["role"] == "assistant":
        return str(said[0]["content"])
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in said)


def _secret(key: str | None) -> str:
    """The server's key. Raises UserError where this process does not see it."""
    if key is not None and key not in os.environ:
        raise UserError(f"judge: there is no environment variable '{key}'; name it in reward.env too")
    return "none" if key is None else os.environ[key]


def _prepare(key: str | None = None, cache: str | None = None, **settings: Any) -> None:
    _secret(key)
    if cache is not None:
        _Cache(cache)


def _columns(template: str | None = None, **settings: Any) -> list[str]:
    return [name for name in _FIELD.findall(template or "") if name not in ("prompt", "completion", "completions")]


def _check_scope(name: str, cfg: RewardFunctionConfig) -> None:
    if cfg.args.get("together") and cfg.scope != "group":
        raise UserError(f"{key_of(name)}.scope: is {cfg.scope}, but with together=true it must be group")


PREPARATIONS["judge"] = _prepare
COLUMNS["judge"] = _columns
CHECKS["judge"] = _check_scope
