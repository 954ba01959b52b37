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
    pairs: compare a prompt's replies by twos instead, with `{first}` and `{second}` in the template, in so many pairs
        at most, but each reply in one at least; all there are where it is large. Each pair is asked about in both
        orders. A reply earns its share of victories, from 0 to 1. It needs `scope: group`. Without `choices` or
        `field` the answer ends in `[[A]]`, `[[B]]` or, for a tie, `[[C]]`; what these say is of the first reply.
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

import importlib
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sapo_rl.config import RewardFunctionConfig
from sapo_rl.config.reward import key_of
from sapo_rl.errors import UserError
from sapo_rl.processes import is_dry_run
from sapo_rl.processes.posting import check_url, is_variable
from sapo_rl.rewards.answers import Reading
from sapo_rl.rewards.chat_server import Asking, Cache, ChatServer, Limits, chat_server, key_of_judge
from sapo_rl.rewards.registry import CHECKS, COLUMNS, PREPARATIONS, REWARD_FUNCTIONS, Completion, Score
from sapo_rl.rewards.tournament import games, victories
from sapo_rl.rewards.waiting import all_of

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
PAIR = """\
Question:
{prompt}

Reply A:
{first}

Reply B:
{second}

Which reply is better? Give your reason in a sentence, then [[A]], [[B]] or, where they are equally good, [[C]] alone on
the last line."""
VERDICTS = {"[[A]]": 1.0, "[[B]]": 0.0, "[[C]]": 0.5}
"""What an answer to PAIR pays the first reply."""
_FIELD = re.compile(r"\{(\w+)\}")


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
    pairs: int | None = None,
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
) -> list[Score]:
    """What a judge says of each reply: the last number of its answer, from `low` to `high`, as a share from 0 to 1.

    With `pairs` the share of its comparisons that a reply has won, None for one that is alone, and `consistency` beside
    it: how far the two orders of a pair gave the same verdict, from 0 to 1, in the mean.

    Raises:
        UserError: settings that cannot be.
        ValueError: an answer that cannot be read, or a field of the template that is no column.
        ServerError: the server gave no answer.
    """
    if pairs is not None and choices is None and field is None:
        choices = VERDICTS
    template = template or (TOGETHER if together else TEMPLATE if pairs is None else PAIR)
    reading = Reading(low, high, choices, field, together)
    pace = Limits(at_once, requests_per_minute, tokens_per_minute, retries, answer_timeout)
    asking = Asking(url, model, system, temperature, max_tokens, json.dumps(extra or {}), key, cache, pace)
    _check(reading, asking, template, votes, pairs)
    if not completions:
        return []
    question = _Question(await chat_server(asking), template, reading, votes)
    fields = _fields(completions, prompts, columns)
    if pairs is not None:
        return await _compared(question, fields, pairs)
    if together:
        shown = (f"Reply {number}:\n{one['completion']}" for number, one in enumerate(fields, start=1))
        text = question.worded({**fields[0], "completions": "\n\n".join(shown)})
        return [*await question.asked(text, len(fields))]
    return [value for (value,) in await all_of([question.asked(question.worded(one)) for one in fields])]


def _fields(
    completions: list[Completion], prompts: list[Any], columns: Mapping[str, list[Any]]
) -> list[dict[str, Any]]:
    """What can stand in the template, for each reply."""
    return [
        {
            **{name: values[place] for name, values in columns.items()},
            "prompt": _shown(prompt),
            "completion": _shown(one),
        }
        for place, (prompt, one) in enumerate(zip(prompts, completions, strict=True))
    ]


class _Question:
    """What a judge is asked, of one reply, two or all.

    Args:
        server: of the judge.
        template: with fields in braces.
        reading: how its answers become numbers.
        votes: how often each question is asked.
    """

    def __init__(self, server: ChatServer, template: str, reading: Reading, votes: int) -> None:
        self._server, self._template, self._reading, self._votes = server, template, reading, votes

    def worded(self, fields: Mapping[str, Any]) -> str:
        """Return the question with its fields filled in, or raise ValueError for one that there is not."""

        def fill(found: re.Match[str]) -> str:
            if found[1] not in fields:
                raise ValueError(f"the template names '{found[1]}', which is no column; there are {', '.join(fields)}")
            return str(fields[found[1]])

        return _FIELD.sub(fill, self._template)

    async def asked(self, text: str, count: int = 1) -> list[float]:
        """Return the means of all votes that can be read, one for each of `count` replies.

        Raises:
            ValueError: none can.
        """
        problems: list[ValueError] = []

        async def ask(vote: int) -> list[float] | None:
            try:
                return await self._server.ask(text, vote, lambda said: self._reading.rewards(said, count))
            except ValueError as error:
                problems.append(error)
                return None

        found = [one for one in await all_of(map(ask, range(self._votes))) if one is not None]
        if not found:
            raise problems[-1]
        return [statistics.fmean(values) for values in zip(*found, strict=True)]


async def _compared(question: _Question, replies: Sequence[Mapping[str, Any]], most: int) -> list[Score]:
    """Each reply's share of victories; None for one that is alone."""
    problem = ValueError()

    async def ask(one: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
        nonlocal problem
        text = question.worded({**one, "first": one["completion"], "second": other["completion"]})
        try:
            return (await question.asked(text))[0]
        except ValueError as error:
            problem = error
            return None

    async def both(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float | None, float | None]:
        ahead, turned = await all_of([ask(one, other), ask(other, one)])
        return ahead, turned

    pairs = games(len(replies), most)
    verdicts = await all_of([both(replies[one], replies[other]) for one, other in pairs])
    found = victories(len(replies), pairs, verdicts)
    if pairs and None in found:
        raise problem
    return found


def _check(reading: Reading, asking: Asking, template: str, votes: int, pairs: int | None) -> None:
    """Raise UserError where settings cannot be."""
    limits, pays = asking.limits, reading.choices or {}
    needed = ["completions"] if reading.together else ["completion"] if pairs is None else ["first", "second"]
    absent = [name for name in needed if name not in _FIELD.findall(template)]
    ways = [reading.choices is not None, reading.field is not None, reading.together]
    rates = (limits.requests_per_minute, limits.tokens_per_minute, limits.answer_timeout)
    try:
        check_url(asking.url)
    except ValueError as error:
        raise UserError(f"judge: {error}") from error
    rules = (
        (reading.low < reading.high, f"low is {reading.low:g}, must be below high, {reading.high:g}"),
        (reading.choices != {}, "choices is empty; it has words and what they pay"),
        (
            all(isinstance(one, str) and type(pay) in (int, float) for one, pay in pays.items()),
            "choices must be words with a number each; put words that YAML takes for others (yes, no) in quotes",
        ),
        (asking.extra.startswith("{"), f"extra is {asking.extra}, must be entries of a request"),
        (pairs is None or not reading.together, "only one of together and pairs can be set"),
        (sum(ways) <= 1, "only one of choices, field and together can be set"),
        (not absent, f"template does not hold {{{absent and absent[0]}}}"),
        (pairs is None or pairs > 0, f"pairs is {pairs}, must be at least 1"),
        (
            pairs is None or all(0 <= pay <= 1 for pay in pays.values()),
            "with pairs choices must pay the first reply from 0 to 1, as the second gets the rest",
        ),
        (min(votes, limits.at_once, asking.max_tokens) > 0, "votes, at_once and max_tokens must be at least 1"),
        (limits.retries >= 0, f"retries is {limits.retries}, must be at least 0"),
        (
            all(one is None or one > 0 for one in rates),
            "requests_per_minute, tokens_per_minute and answer_timeout must be above 0",
        ),
        (is_variable(asking.key), "key must be the name of an environment variable"),
    )
    for holds, problem in rules:
        if not holds:
            raise UserError(f"judge: {problem}")


def _shown(said: str | Sequence[Mapping[str, Any]]) -> str:
    """A text, or a chat with its roles; one message of the assistant is its text."""
    if isinstance(said, str):
        return said
    if len(said) == 1 and said[0]["role"] == "assistant":
        return str(said[0]["content"])
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in said)


def _prepare(key: str | None = None, cache: str | None = None, **settings: Any) -> None:
    importlib.import_module("aiohttp")
    key_of_judge(key)
    if cache is not None and not is_dry_run():
        Cache(cache).close()


def _columns(template: str | None = None, pairs: int | None = None, **settings: Any) -> list[str]:
    ours = ("prompt", "completion", "completions") if pairs is None else ("prompt", "first", "second")
    return [name for name in _FIELD.findall(template or "") if name not in ours]


def _check_scope(name: str, cfg: RewardFunctionConfig) -> None:
    for setting in ("together", "pairs"):
        if cfg.args.get(setting) and cfg.scope != "group":
            given = f"{setting}={str(cfg.args[setting]).lower()}"
            raise UserError(f"{key_of(name)}.scope: is {cfg.scope}, but with {given} it must be group")


PREPARATIONS["judge"] = _prepare
COLUMNS["judge"] = _columns
CHECKS["judge"] = _check_scope
