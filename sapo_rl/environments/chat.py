"""The tokens of a chat over several turns: the model's own kept as they are, of all else only what is new rendered.

Nothing that the model has written is tokenised again. What follows a reply is found by rendering a short conversation
of two messages with the new ones after them, and taking what comes after the reply.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from sapo_rl.environments import parsers
from sapo_rl.environments.messages import WORD, Message, as_users, left_out, tool_call
from sapo_rl.errors import UserError
from sapo_rl.types import Row, Span, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_START, _END = "sapo7start", "sapo7end"
_TAG = re.compile(r"[<\[|]")
_THOUGHT_END = "\n</think>\n\n"
CACHED = 4096
"""Renderings that are kept: games say the same again and again."""


class Refused(UserError):
    """The chat template does not render such messages."""


class ChatTemplate:
    """A tokenizer's chat template, by which new messages become tokens without rendering the old ones again.

    Raises:
        UserError: a tokenizer without a chat template, or an unknown parser.

    Example:
        >>> chat = ChatTemplate(tokenizer)
        >>> talk = chat.begin(prompt.token_ids, prompt.content)
        >>> talk.reply([9707, 151645], logps=None, truncated=False)
        {'role': 'assistant', 'content': 'Hello'}
        >>> talk.extend([{"role": "user", "content": "And now?"}])  # tokens, not trained on
        9
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        parser: str = "auto",
        arguments: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.tools = list(tools) if tools else None
        self.arguments = arguments or {}
        try:
            text = cast(Any, tokenizer).get_chat_template(tools=self.tools)
        except ValueError as error:
            raise UserError("model.path: its tokenizer has no chat template, which an environment needs") from error
        self.parser = parsers.choose(parser, text, tools=bool(self.tools))
        self._thinks = "</think>" in text
        added = tokenizer.added_tokens_decoder.items()
        self.special = {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}
        self.shows_calls = True
        """Whether calls of tools are rendered; where not, they stay in the content as they were written."""
        self._arguments_are_text = False
        self.shows_calls = self._find_calls()
        self.opening = self._find_opening()
        """What the generation prompt writes of the reply itself, such as the begin of its thinking."""
        self._after = lru_cache(CACHED)(self._after_of)
        self._started = lru_cache(CACHED)(self._ids_of)
        self._keeps_words = False
        self._keeps_words = self.keeps({"role": "assistant", "content": "words"})

    def render(self, messages: Sequence[Message], generation_prompt: bool = True) -> str:
        """Return the text of a conversation, with a generation prompt or left open where the last one is the model's.

        Raises:
            Refused: the template has no words for it.
        """
        unfinished = generation_prompt and messages[-1]["role"] == "assistant"
        messages = [self._worded(one) for one in messages]
        try:
            return cast(Any, self.tokenizer).apply_chat_template(
                messages,
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=generation_prompt and not unfinished,
                continue_final_message=unfinished,
                **self.arguments,
            )
        except Exception as error:  # a template computes, and raises what it likes
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise Refused(f"the chat template refuses messages of the roles {roles}: {error}") from error

    def _worded(self, message: Message) -> Message:
        """The message with its calls and its thinking as the template takes them."""
        if "thinking" in message:  # Gemma 4's word for it, beside gpt-oss's
            message = message | {"reasoning": message["thinking"]}
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        if "tool_calls" not in message or not self.shows_calls:
            return rest
        if not self._arguments_are_text:
            return message
        functions = [call["function"] for call in message["tool_calls"]]
        texts = [one | {"arguments": json.dumps(one["arguments"], ensure_ascii=False)} for one in functions]
        calls = [call | {"function": text} for call, text in zip(message["tool_calls"], texts, strict=True)]
        return rest | {"tool_calls": calls}

    def encode(self, text: str) -> list[int]:
        """Return the ids of rendered text: the template has written the special tokens itself."""
        text = text.encode(errors="replace").decode()  # half of a character is no text
        return list(cast(Any, self.tokenizer)(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: list[int], special: bool = False) -> str:
        """Return the text of ids, special tokens skipped unless asked for."""
        return cast(Any, self.tokenizer).decode(token_ids, skip_special_tokens=not special)

    def _ids_of(self, messages: str) -> list[int]:
        return self.encode(self.render(json.loads(messages)))

    def start(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a whole prompt, as the model is asked to go on from it. Raises Refused as `render` does."""
        return list(self._started(json.dumps(messages)))

    def begin(self, prompt_ids: list[int], messages: Sequence[Message]) -> Conversation:
        """Return a conversation that stands before the model's first reply to a prompt tokenised already."""
        return Conversation(self, prompt_ids, messages)

    def tail(self, message: Message, new: Sequence[Message], last: int | None, cut: bool) -> list[int] | None:
        """Return the ids after a reply that ends in the id `last`: the end of its turn, `new`, the generation prompt.

        `last` is not repeated. None where it is a stop token that the template would take back, or where the template
        does not say `new` after the reply, but elsewhere; a reply that was cut has no stop token.

        Raises:
            Refused: the template does not take `new` after such a message.
        """
        probe = self._probe(message)
        if (after := self._after(json.dumps([probe, *new]))) is None:
            return None
        ids, alone = list(after), list(self._after(json.dumps([probe])) or ())
        if message.get("tool_calls") and self.shows_calls:  # what is left of the call is the model's own
            ids, alone = self._from_special(ids), self._from_special(alone)
        if last not in self.special:
            return ids
        closing = ids[: _shared(ids, alone) + 1]  # some templates end a turn by the begin of the next
        if last in closing:
            return ids[closing.index(last) + 1 :]
        return ids if cut else None

    def thought_end(self, message: Message) -> str:
        """Return what ends the thinking of a reply; empty where that is not open, or the template knows none."""
        said = (self.opening + message["content"]).lstrip()
        return _THOUGHT_END if self._thinks and said.startswith("<think>") and "</think>" not in said else ""

    def keeps(self, message: Message) -> bool:
        """Return whether the words of a reply, with those its prompt opened it with, are there when the chat goes on.

        Raises:
            Refused: the template does not take such a message.
        """
        if self._keeps_words and message.keys() == {"role", "content"} and not _TAG.search(message["content"]):
            return True  # what templates take back stands in tags
        results = [
            {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": "1"}
            for call in message.get("tool_calls", [])
        ]
        later = [*results, {"role": "assistant", "content": "2"}] if results else []
        after = [*later, {"role": "user", "content": _END}]
        try:
            text = self.render([_user(), message, *after])
        except Refused:
            text = self.render([_user(), message, *as_users(after)])
        return self.finds([message], text.partition(_START)[2].partition(_END)[0])

    def finds(self, replies: Sequence[Message], text: str) -> bool:
        """Return whether the words of all replies are in a rendered text, in their order."""
        words, place = f" {' '.join(WORD.findall(text))} ", 0
        for reply in replies:
            thinking, content = reply.get("thinking", ""), reply["content"]
            for part in (self.opening + thinking, content) if thinking else (self.opening + content,):
                said = "".join(f"{word} " for word in WORD.findall(part))
                place = words.find(f" {said}", place)
                if place < 0:
                    return False
                place += len(said)
        return True

    def _after_of(self, messages: str) -> list[int] | None:
        """The ids after the mark of the first of the messages, which are JSON; with more than it, to go on from.

        None where the others are not there.
        """
        probe, *new = json.loads(messages)
        text = self.render([_user(), probe, *new], generation_prompt=bool(new)).partition(_END)[2]
        return None if left_out(new, text) else self.encode(text)

    def _probe(self, message: Message) -> Message:
        """The same kind of message with a mark where its last words are."""
        calls = message.get("tool_calls", [])
        if not calls or not self.shows_calls:
            return message | {"content": _END}
        last = calls[-1] | {"function": calls[-1]["function"] | {"arguments": {"x": _END}}}
        return message | {"content": "", "tool_calls": [*calls[:-1], last]}

    def _from_special(self, ids: list[int]) -> list[int]:
        """What begins with the first special token; all where there is none."""
        return ids[next((place for place, one in enumerate(ids) if one in self.special), 0) :]

    def _find_opening(self) -> str:
        said = [_user(), {"role": "assistant", "content": _END}, {"role": "user", "content": "1"}]
        text = self.render(said).partition(_START)[2]
        if _END not in text:
            raise UserError("model.path: its chat template leaves out the content of messages that are text")
        prompt, header = self.render([_user()]).partition(_START)[2], text.partition(_END)[0]
        return prompt[_shared(prompt, header) :]

    def _find_calls(self) -> bool:
        """Whether calls are rendered, their arguments as a dictionary or, as DeepSeek's templates want it, as text."""
        name = self.tools[0]["function"]["name"] if self.tools else "tool"
        call = tool_call(parsers.Call(name, {"x": _END}), 0)
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        for self._arguments_are_text in (False, True):
            with contextlib.suppress(Refused):
                if _END in self.render([_user(), called], generation_prompt=False):
                    return True
        return False


@dataclass
class _Stream:
    """A row under way."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list[int])
    spans: list[Span] = field(default_factory=list[Span])
    logps: list[float] | None = None
    fragile: list[Message] = field(default_factory=list[Message])
    """Replies in it of which the template takes back something sooner or later."""

    def row(self) -> Row:
        """What was sent of it, and sampled."""
        end = self.spans[-1][1] if self.spans else 0
        whole = self.spans == [(0, end)] or not self.spans
        return Row(self.prompt_ids, self.token_ids[:end], None if whole else self.spans, self.logps)


class Conversation:
    """An episode's stream of tokens: the model's own verbatim, of all else only what is new rendered and appended.

    What is sent begins with all that was sent and sampled before. Where the template does not go on like that (it takes
    back the thinking, or the stop token is not the one that it ends a turn with), the episode forks into a further row
    whose prompt is the whole transcript, rendered.
    """

    def __init__(self, template: ChatTemplate, prompt_ids: list[int], messages: Sequence[Message]) -> None:
        self.template = template
        self.messages: list[Message] = [dict(message) for message in messages]
        """The transcript so far."""
        self.problem = ""
        """What is wrong with the last reply's calls, in words for the model; empty where nothing is."""
        self._streams = [_Stream(list(prompt_ids))]
        self._turns: list[Turn] = []
        self._calls = 0
        self._replied = False
        self._last: int | None = None
        self._cut = False

    @property
    def next_prompt(self) -> list[int]:
        """The ids to send for the next turn."""
        return self._streams[-1].prompt_ids + self._streams[-1].token_ids

    @property
    def forks(self) -> int:
        """How many times what was sent did not begin with what came before."""
        return len(self._streams) - 1

    def reply(self, token_ids: list[int], logps: list[float] | None, truncated: bool) -> Message:
        """Append what the model wrote, with its stop token, and return it as a message, calls of tools parsed.

        A malformed call stays in the content, and `problem` says what is wrong.
        """
        stream = self._streams[-1]
        start, end = len(stream.token_ids), len(stream.token_ids) + len(token_ids)
        stream.token_ids += token_ids
        if token_ids:
            stream.spans.append((start, end))
        if logps is not None:
            stream.logps = [*(stream.logps or []), *logps]
        self._turns.append(Turn(start, end, self.forks))
        self._last, self._cut = token_ids[-1] if token_ids else None, truncated
        self._replied = True
        opened = self.messages.pop()["content"] if self.messages[-1]["role"] == "assistant" else ""
        message = self._message(opened, token_ids)
        self.messages.append(message)
        return message

    def _message(self, opened: str, token_ids: list[int]) -> Message:
        """A reply as a message that the template takes; `opened` is what stands in the prompt of it already."""
        template = self.template
        plain: Message = {"role": "assistant", "content": opened + template.decode(token_ids)}
        ids = token_ids[:-1] if self._last in template.special else token_ids
        text = opened + template.decode(ids, template.parser.special)
        parsed = parsers.parse(template.parser, text, template.tools or ())
        self.problem, message = parsed.problem, plain
        if parsed.thinking is not None:
            message = plain | {"content": parsed.content} | ({"thinking": parsed.thinking} if parsed.thinking else {})
        if parsed.calls:
            calls = [tool_call(call, self._calls + place) for place, call in enumerate(parsed.calls)]
            content = parsed.content if template.shows_calls else plain["content"]
            message = {**message, "content": content, "tool_calls": calls}
        try:
            kept = self.template.keeps(message)
        except Refused as error:
            if message is plain:
                raise
            self.problem, message = str(error), plain
            kept = self.template.keeps(plain)
        if not kept:
            self._streams[-1].fragile.append(message)
        self._calls += len(message.get("tool_calls", []))
        return message

    def extend(self, messages: Sequence[Message]) -> int:
        """Append what the environment or the tools say to the last reply, and the generation prompt; not trained on.

        Returns by how many tokens the prompt has grown, which is less than 0 where a fork made it shorter. Messages of
        tools become one message of the user where the template knows no tools.

        Raises:
            Refused: the template has no words for them.
        """
        last = self.messages[-1]
        if not self._replied:
            raise ValueError("extend: the model has not replied to the messages before")
        thought_end = self._end_thought()
        new = [dict(message) for message in messages]
        try:
            tail = self.template.tail(last, new, self._last, self._cut)
        except Refused:
            new = as_users(new)
            tail = self.template.tail(last, new, self._last, self._cut)
        before, stream = len(self.next_prompt), self._streams[-1]
        self._replied = False
        self.messages += new
        if tail is None or (thought_end and not self._cut) or not self._still_there(stream.fragile):
            return self._fork(new) - before
        tail = [*thought_end, *tail]
        stream.token_ids += tail
        return len(tail)

    def _end_thought(self) -> list[int]:
        """End the thinking of the last reply where the model has not; returns the ids for it, not trained on."""
        last, template = self.messages[-1], self.template
        text = template.thought_end(last)
        last["content"] += text
        fragile = self._streams[-1].fragile
        if text and not template.keeps(last) and all(one is not last for one in fragile):
            fragile.append(last)
        return template.encode(text)

    def _fork(self, new: Sequence[Message]) -> int:
        """Go on in a row of its own; returns how long its prompt is."""
        if role := left_out(new, self.template.render(self.messages)):
            raise Refused(f"the chat template leaves out what a message of the role {role} says after a reply")
        fragile = [reply for reply in self._streams[-1].fragile if self._still_there([reply])]
        self._streams.append(_Stream(self.template.start(self.messages), fragile=fragile))
        return len(self._streams[-1].prompt_ids)

    def _still_there(self, replies: list[Message]) -> bool:
        """Whether the template renders all of the replies in the transcript so far."""
        template = self.template
        return not replies or template.finds(replies, template.render(self.messages, generation_prompt=False))

    def rows(self) -> list[Row]:
        """Return the rows so far, up to the last reply: what was appended after it has not been sent."""
        first, *others = self._streams
        return [first.row(), *(stream.row() for stream in others if stream.spans)]

    def turns(self) -> list[Turn]:
        """Return where the model wrote, by rows."""
        return list(self._turns)


def _user() -> Message:
    return {"role": "user", "content": _START}


def _shared(one: Sequence[Any], two: Sequence[Any]) -> int:
    """How much of both is the same, from the front."""
    pairs = enumerate(zip(one, two, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(two)))
