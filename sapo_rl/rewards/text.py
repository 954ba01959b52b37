"""Verifiers that need nothing but the text of the reply."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from sapo_rl.errors import UserError
from sapo_rl.rewards.registry import REWARD_FUNCTIONS, VOTERS, Completion, numbered

_MINUS = "-\u2212\u2013\uff0d"
_GROUP = ",\u00a0\u2009\u202f"
# A minus after a word, digit or bracket is an operator ("5-3"), and a digit inside a word ("x2") is no number.
_NUMBER = re.compile(
    rf"(?:(?<![A-Za-z0-9.)\]])(?P<sign>[{_MINUS}+])[$€£]?|(?<![A-Za-z0-9]))"
    rf"(?P<whole>\d{{1,3}}(?:[{_GROUP}]\d{{3}})+(?!\d)|\d+|(?=\.\d))"
    r"(?P<fraction>\.\d+)?(?P<exponent>[eE][+-]?\d{1,3}(?!\d))?"
)


def text_of(completion: Completion) -> str:
    """Return the text of a completion, which is a string or a list of messages: then the model's last word.

    Empty where the last word was not the model's: what a tool has said is no answer of its.
    """
    if isinstance(completion, str):
        return completion
    return completion[-1]["content"] if completion[-1]["role"] == "assistant" else ""


def final_answer(text: str) -> str:
    r"""Return the part of a reply that is its answer, stripped.

    That is the content of the last `<answer>` tag; else of the last `\boxed{}`; else all that follows the last
    `</think>`; else the whole reply.
    """
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if tagged:
        return tagged[-1].strip()
    text = text.rpartition("</think>")[2]
    boxed = _last_boxed(text)
    return (text if boxed is None else boxed).strip()


def last_number(text: str) -> Decimal | None:
    """Return the last number written in `text`, exactly; None where there is none.

    Understands signs (the Unicode minus too), decimals, exponents (`1.5e-3`) and thousands separated by a comma or a
    narrow or no-break space (`1,234`). A fraction is two numbers, and so is `3,14`; the digit of `x2` is none.
    """
    found = next(iter(deque(_NUMBER.finditer(text), maxlen=1)), None)
    if found is None:
        return None
    whole = re.sub(rf"[{_GROUP}]", "", found["whole"]) or "0"
    value = Decimal(whole + (found["fraction"] or "") + (found["exponent"] or ""))
    return value.copy_negate() if found["sign"] and found["sign"] in _MINUS else value


@REWARD_FUNCTIONS.register_module("exact_match")
def exact_match(
    completions: list[Completion],
    answer: list[Any],
    *,
    ignore_case: bool = False,
    tag: str | None = None,
    **columns: list[Any],
) -> list[float | None]:
    """1 where the reply is the answer, but for white space around it; None where the row has no answer.

    With `tag`, what stands in the last `<tag>...</tag>` of the reply is compared instead of the whole reply.
    """

    def same(text: str, expected: str) -> bool:
        expected = expected.strip()
        return _said(text, ignore_case, tag) == (expected.casefold() if ignore_case else expected)

    return _scores(completions, answer, same)


@VOTERS.register_module("exact_match")
def exact_match_votes(
    completions: list[Completion], *, ignore_case: bool = False, tag: str | None = None, **columns: list[Any]
) -> list[float]:
    """Number the replies by what `exact_match` compares of them; one without the tag has no answer."""
    return numbered(_said(text_of(completion), ignore_case, tag) for completion in completions)


def _said(text: str, ignore_case: bool, tag: str | None) -> str | None:
    """What is compared of a reply; None where it lacks the tag."""
    if tag is not None:
        tagged = re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", text, re.DOTALL)
        if not tagged:
            return None
        text = tagged[-1]
    text = text.strip()
    return text.casefold() if ignore_case else text


@REWARD_FUNCTIONS.register_module("numeric_answer")
def numeric_answer(
    completions: list[Completion], answer: list[Any], *, tolerance: float = 0.0, **columns: list[Any]
) -> list[float | None]:
    """1 where the reply's last number equals the answer's last number (`sapo_rl.rewards.text.last_number`).

    Numbers are compared exactly, as decimals (`3.0` equals `3`), or within the absolute `tolerance`. The answer may be
    a text that ends in its number, as gsm8k's do. None where the row has no answer.

    Raises:
        ValueError: an answer without a number.
    """

    def equal(text: str, expected: str) -> bool:
        wanted, found = last_number(expected), last_number(text)
        if wanted is None:
            raise ValueError(f"the answer {expected!r} holds no number")
        if found is None:
            return False
        return found == wanted if tolerance == 0 else abs(float(found) - float(wanted)) <= tolerance

    if tolerance < 0:
        raise UserError(f"numeric_answer: tolerance must be at least 0, got {tolerance}")
    return _scores(completions, answer, equal)


@VOTERS.register_module("numeric_digits")
@VOTERS.register_module("numeric_answer")
def numeric_votes(completions: list[Completion], **columns: list[Any]) -> list[float]:
    """Number the replies by their last number."""
    return numbered(last_number(text_of(completion)) for completion in completions)


@REWARD_FUNCTIONS.register_module("numeric_digits")
def numeric_digits(completions: list[Completion], answer: list[Any], **columns: list[Any]) -> list[float | None]:
    """Share of the answer's digits that the reply's last number has at the same places, the sign counted as one.

    Partial credit for whole numbers: `-217` for `-216` earns 3/4. Places are counted from the ones; digits that only
    one of the numbers has count as wrong. None where the row has no answer, 0 for a fraction.

    Raises:
        ValueError: an answer that is no whole number.
    """

    def share(text: str, expected: str) -> float:
        wanted, found = last_number(expected), last_number(text)
        if wanted is None or not _is_whole(wanted):
            raise ValueError(f"the answer {expected!r} is no whole number")
        if found is None or not _is_whole(found):
            return 0.0
        digits = [f"{number.copy_abs():.0f}"[::-1] for number in (wanted, found)]
        same = sum(one == other for one, other in zip(*digits, strict=False)) + ((wanted < 0) == (found < 0))
        return same / (max(map(len, digits)) + 1)

    return _scores(completions, answer, share)


@REWARD_FUNCTIONS.register_module("regex")
def regex(
    completions: list[Completion], *, pattern: str, full: bool = False, **columns: list[Any]
) -> list[float | None]:
    """1 where the regular expression `pattern` is found in the reply; with `full`, where it matches all of it.

    Python's syntax; put `(?s)`, `(?i)` or `(?m)` first for its flags.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"regex: the pattern {pattern!r} is no regular expression: {error}") from error
    find = expression.fullmatch if full else expression.search
    return [float(find(text_of(completion)) is not None) for completion in completions]


@REWARD_FUNCTIONS.register_module("format_tags")
def format_tags(
    completions: list[Completion],
    *,
    tags: list[str] | None = None,
    trailing: bool = False,
    **columns: list[Any],
) -> list[float | None]:
    """1 where the reply is made of the `tags` (by default think, answer), each once, in this order, closed, not nested.

    Only white space may stand before, between and after them; with `trailing`, any text may follow the last.
    """
    names = ["think", "answer"] if tags is None else tags
    if not names or any(not re.fullmatch(r"[\w-]+", name) for name in names):
        raise UserError(f"format_tags: tags must be names without brackets, like [think, answer], got {names}")

    def well_formed(rest: str) -> bool:
        marks = [mark for name in names for mark in (f"<{name}>", f"</{name}>")]
        if any(rest.count(mark) != 1 for mark in marks):
            return False
        for name in names:
            before, _, rest = rest.partition(f"<{name}>")
            body, closed, rest = rest.partition(f"</{name}>")
            if before.strip() or not closed or any(mark in body for mark in marks):
                return False
        return trailing or not rest.strip()

    return [float(well_formed(text_of(completion))) for completion in completions]


@REWARD_FUNCTIONS.register_module("length_limit")
def length_limit(
    completions: list[Completion],
    completion_ids: list[list[int]],
    *,
    max_tokens: int,
    soft: int = 0,
    **columns: list[Any],
) -> list[float | None]:
    """0 for replies of up to `max_tokens - soft` tokens, -1 beyond `max_tokens`, falling linearly in between.

    DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), with L the tokens of a reply, L_max = `max_tokens`
    and L_cache = `soft`, the buffer::

        0                             L <= L_max - L_cache
        (L_max - L_cache - L) / L_cache     L_max - L_cache < L <= L_max
        -1                            L_max < L
    """
    if max_tokens < 1 or not 0 <= soft <= max_tokens:
        raise UserError(f"length_limit: needs max_tokens >= 1 and 0 <= soft <= max_tokens, got {max_tokens} and {soft}")

    def penalty(length: int) -> float:
        if length <= max_tokens - soft:
            return 0.0
        return -1.0 if length > max_tokens else (max_tokens - soft - length) / soft

    return [penalty(len(ids)) for ids in completion_ids]


def _scores(
    completions: list[Completion], answers: list[Any], score: Callable[[str, str], float]
) -> list[float | None]:
    """Score each reply's text against its answer's; None where the row has no answer."""
    return [
        None if answer is None else float(score(text_of(completion), str(answer)))
        for completion, answer in zip(completions, answers, strict=True)
    ]


def _is_whole(number: Decimal) -> bool:
    return number == number.to_integral_value()


def _last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces balance."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None
