"""OpenAI's chat completions as they go over the wire: what is asked, checked, and what is answered."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sapo_rl.config import RolloutConfig
from sapo_rl.engines.vllm.bodies import what_is_wrong
from sapo_rl.environments.messages import Message

Said: TypeAlias = tuple[str, str, str]
"""A message by which a conversation is known again: role, words, calls. Clients add and leave out the rest."""

HARMLESS = frozenset(
    (
        *("model", "user", "metadata", "store", "service_tier", "seed"),
        *("parallel_tool_calls", "safety_identifier", "prompt_cache_key"),
    )
)
"""What a request may hold and nothing depends on."""


class Refusal(Exception):
    """An answer that is an error; the message is for the agent's author."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": code, "code": code}}


class _Function(BaseModel):
    name: str
    arguments: str = "{}"


class _Call(BaseModel):
    id: str = ""
    function: _Function


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class _Described(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str


class _Tool(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: _Described


class _StreamOptions(BaseModel):
    include_usage: bool | None = None


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow")
    messages: list[_Message] = Field(min_length=1)
    tools: list[_Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: Literal[1] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class Asked(NamedTuple):
    """What an agent asks for."""

    messages: list[Message]
    """As chat templates read them."""
    tools: list[dict[str, Any]]
    most: int | None
    """Tokens of the reply, where it says so."""
    stream: bool
    counts: bool
    """Whether a stream shall end in the number of tokens."""


class Reply(NamedTuple):
    """What the model has written."""

    message: Message
    truncated: bool
    prompt_tokens: int
    tokens: int


def parsed(body: bytes, cfg: RolloutConfig) -> Asked:
    """Read a request.

    Raises:
        Refusal: it is none, or asks for what a rollout is not: another sampling than the run's, stop words, several
            completions, pictures, a forced call of a tool.
    """
    try:
        asked = _Body.model_validate_json(body)
    except ValidationError as error:
        raise Refusal(what_is_wrong(error)) from error
    for name, own in (("temperature", cfg.temperature), ("top_p", cfg.top_p)):
        value = getattr(asked, name)
        if value is not None and value != own:
            raise Refusal(f"{name}: is {value:g}, must be {own:g} as rollout.{name} is; leave it out")
    for name, value in (asked.model_extra or {}).items():
        if name not in HARMLESS and value not in (None, [], {}, False, 0, {"type": "text"}):
            raise Refusal(f"{name}: is not possible in a rollout; leave it out")
    if asked.messages[-1].role == "assistant":
        raise Refusal("messages: the last one is the assistant's, so there is nothing to reply to")
    tools = [] if asked.tool_choice == "none" else [tool.model_dump() for tool in asked.tools or []]
    limits = [limit for limit in (asked.max_tokens, asked.max_completion_tokens) if limit is not None]
    counts = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    return Asked(_messages(asked.messages), tools, min(limits, default=None), bool(asked.stream), counts)


def _messages(given: list[_Message]) -> list[Message]:
    names = {call.id: call.function.name for one in given for call in one.tool_calls or []}
    found: list[Message] = []
    for one in given:
        parts = one.content if isinstance(one.content, list) else []
        text = one.content if isinstance(one.content, str) else "".join(part.text for part in parts)
        message: Message = {"role": "system" if one.role == "developer" else one.role, "content": text}
        if one.tool_calls:
            message["tool_calls"] = [_call(call) for call in one.tool_calls]
        if one.role == "tool":
            called = one.tool_call_id or ""
            message |= {"tool_call_id": called, "name": one.name or names.get(called, "tool")}
        found.append(message)
    return found


def _call(call: _Call) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
    except ValueError:
        arguments = call.function.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def said(message: Message) -> Said:
    """Return what a message is known again by; blanks around the words of the model do not count."""
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
    words = message["content"].strip() if message["role"] == "assistant" else message["content"]
    return message["role"], words, json.dumps(calls, sort_keys=True)


def new_id() -> str:
    """Return what a completion is called that nobody has named."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def completion(reply: Reply, name: str) -> dict[str, Any]:
    """Return the answer to a request; `name` is its id."""
    choice = {"index": 0, "message": _told(reply.message), "finish_reason": finish(reply), "logprobs": None}
    return _head("chat.completion", name) | {"choices": [choice], "usage": _usage(reply)}


def events(reply: Reply, name: str, counts: bool) -> bytes:
    """Return the answer as a stream of events: the whole reply in one, since it is there when it is answered."""
    head = _head("chat.completion.chunk", name)
    told = _told(reply.message)
    told["tool_calls"] = [{"index": place, **call} for place, call in enumerate(told.pop("tool_calls", []))] or None
    chunks = [
        head | {"choices": [{"index": 0, "delta": told, "finish_reason": None}]},
        head | {"choices": [{"index": 0, "delta": {}, "finish_reason": finish(reply)}]},
        *([head | {"choices": [], "usage": _usage(reply)}] if counts else []),
    ]
    return b"".join(b"data: %s\n\n" % json.dumps(chunk).encode() for chunk in chunks) + b"data: [DONE]\n\n"


def _head(kind: str, name: str) -> dict[str, Any]:
    return {"id": name, "object": kind, "created": int(time.time()), "model": "policy"}


def _told(message: Message) -> dict[str, Any]:
    calls = message.get("tool_calls", [])
    told: dict[str, Any] = {"role": "assistant", "content": message["content"] or (None if calls else "")}
    if calls:
        functions = [call["function"] for call in calls]
        wired = [one | {"arguments": json.dumps(one["arguments"], ensure_ascii=False)} for one in functions]
        told["tool_calls"] = [call | {"function": one} for call, one in zip(calls, wired, strict=True)]
    return told | ({"reasoning": message["thinking"]} if "thinking" in message else {})


def finish(reply: Reply) -> str:
    """Return why a reply ended, in OpenAI's words."""
    return "length" if reply.truncated else "tool_calls" if reply.message.get("tool_calls") else "stop"


def _usage(reply: Reply) -> dict[str, int]:
    whole = reply.prompt_tokens + reply.tokens
    return {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens, "total_tokens": whole}
