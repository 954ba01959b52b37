"""What a model wrote, read for calls of tools: text in, content and calls out. The names are vLLM's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from sapo_rl.errors import UserError, did_you_mean


class Call(NamedTuple):
    """One call of a tool, as the model wrote it."""

    name: str
    arguments: dict[str, Any]


class Parsed(NamedTuple):
    """A reply taken apart."""

    content: str
    """What is no call."""
    calls: list[Call]
    """In their order; empty where there is none, or where one is malformed."""
    problem: str = ""
    """What is wrong with a call, in words for the model; empty where nothing is."""


def hermes(text: str) -> Parsed:
    """Read the JSON objects between `<tool_call>` and `</tool_call>`; the last end may be missing."""
    before, *blocks = text.split("<tool_call>")
    if not blocks:
        return Parsed(text, [])
    contents, calls = [before], []
    for block in blocks:
        written, _, after = block.partition("</tool_call>")
        found = _calls(written)
        if isinstance(found, str):
            return Parsed(text, [], found)
        calls += found
        contents.append(after)
    return Parsed("".join(contents).strip(), calls)


def bare_json(text: str) -> Parsed:
    """Read a JSON object with `name` and `arguments`, or a list of them: the whole text, or in a fence."""
    fence = re.search(r"```(?:json)?\s*\n?([\[{].*?)\s*```", text, re.DOTALL)
    written = fence[1] if fence else text.strip()
    if not written.startswith(("{", "[")) or '"name"' not in written:
        return Parsed(text, [])
    found = _calls(written)
    if isinstance(found, str):
        return Parsed(text, [], found)
    return Parsed((text[: fence.start()] + text[fence.end() :]).strip() if fence else "", found)


def _calls(written: str) -> list[Call] | str:
    """The calls in a JSON text, or what is wrong with it."""
    try:
        value = json.loads(written)
    except ValueError as error:
        return f"the call of a tool is no valid JSON: {error}"
    calls = []
    for one in value if isinstance(value, list) else [value]:
        arguments = one.get("arguments", one.get("parameters", {})) if isinstance(one, dict) else None
        if not isinstance(arguments, dict) or not isinstance(one.get("name"), str):
            return 'a call of a tool must be a JSON object with "name", a text, and "arguments", an object'
        calls.append(Call(one["name"], arguments))
    return calls


PARSERS: dict[str, Callable[[str], Parsed]] = {"hermes": hermes, "json": bare_json}
"""By name; each reads a reply without its special tokens."""


def choose(name: str, chat_template: str) -> Callable[[str], Parsed]:
    """Return the parser of a name; `auto` is the one that the chat template speaks of, else `json`.

    Raises:
        UserError: an unknown name.
    """
    if name == "auto":
        return _either if "<tool_call>" in chat_template else bare_json
    if name not in PARSERS:
        raise UserError(f"rollout.tool_parser: unknown value '{name}'; {did_you_mean(name, ['auto', *PARSERS])}")
    return PARSERS[name]


def _either(text: str) -> Parsed:
    """Tags, or where there are none bare JSON."""
    found = hermes(text)
    return found if found.calls or found.problem else bare_json(text)
