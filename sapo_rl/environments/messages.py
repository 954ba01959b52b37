"""Messages of a chat: what a call of a tool looks like, what stands for results, which of them a text has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from sapo_rl.environments.parsers import Call

Message: TypeAlias = dict[str, Any]
"""A message in OpenAI's shape; `function.arguments` of its `tool_calls` is a dictionary, as chat templates read it."""

WORD = re.compile(r"\w+")
"""What counts when texts are compared: templates trim and wrap."""


def tool_call(call: Call, number: int) -> dict[str, Any]:
    """Return a call as a message of the model holds it; its id is nine letters and digits, as some templates want."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call{number:05d}", "type": "function", "function": function}


def as_users(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with each run of tools' messages as one of the user's."""
    new: list[Message] = []
    run = False
    for message in messages:
        if message["role"] != "tool":
            new.append(message)
        elif run:
            new[-1] = {"role": "user", "content": f"{new[-1]['content']}\n{message['content']}"}
        else:
            new.append({"role": "user", "content": message["content"]})
        run = message["role"] == "tool"
    return new


def left_out(messages: Sequence[Message], text: str) -> str:
    """Return the role of the first message whose words are not in a rendered text; empty where there is none.

    What tools say is not looked for: a template may write it as JSON.
    """
    there = " ".join(WORD.findall(text))
    said = ((one["role"], " ".join(WORD.findall(one["content"] or ""))) for one in messages if one["role"] != "tool")
    return next((role for role, words in said if words not in there), "")
