"""`check=chat`: what the model's chat template does with a conversation of three turns and a tool, token by token."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sapo_rl.config import Config
from sapo_rl.environments import parsers
from sapo_rl.environments.chat import ChatTemplate, Conversation, Message, Refused, as_users, tool_call
from sapo_rl.environments.parsers import PARSERS, Call
from sapo_rl.policy.model import load_tokenizer, stop_tokens
from sapo_rl.run.checks import ConfigError

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add_numbers",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "The first."},
                "b": {"type": "integer", "description": "The second."},
            },
            "required": ["a", "b"],
        },
    },
}
CALL = Call("add_numbers", {"a": 2, "b": 3})
QUESTION: list[Message] = [{"role": "user", "content": "What is 2 + 3?"}]
THOUGHT = "<think>\nLet me see.\n</think>\n\n"
SHOWN = 160
"""Characters shown of a stretch of tokens, from its end."""


@dataclass
class Stretch:
    """Tokens in a row that are all trained on, or none of them."""

    what: str
    token_ids: list[int]
    trained: bool = False


@dataclass
class Trial:
    """A conversation of three turns: a call of a tool, an answer, and another after the user's next question."""

    chat: ChatTemplate
    stops: list[int]
    stretches: list[Stretch] = field(default_factory=list)

    def play(self) -> Conversation:
        """Have the model write what its template would write of it, and note every stretch of tokens."""
        talk = self.chat.begin(self.chat.start(QUESTION), QUESTION)
        self.stretches = [Stretch("prompt", talk.next_prompt)]
        message = self._reply(talk, self.call())
        self._extend(talk, "tool", _result(message))
        self._reply(talk, self.said("It is 5."))
        self._extend(talk, "user", {"role": "user", "content": "And twice that?"})
        self._reply(talk, self.said("It is 10."))
        return talk

    @property
    def keeps_thinking(self) -> bool:
        """Whether what stands in <think> tags is in the history."""
        return self.chat.keeps({"role": "assistant", "content": f"{THOUGHT}Five."})

    def said(self, text: str) -> Message:
        """Return a reply, with a thought where the template knows of thinking and does not rule it out."""
        thinks = not self.keeps_thinking and "</think>" not in self.chat.opening
        return {"role": "assistant", "content": THOUGHT + text if thinks else text}

    def call(self) -> Message:
        """Return the message that calls the tool; bare JSON where the template has no form for it."""
        if self.chat.shows_calls:
            return self.said("") | {"tool_calls": [tool_call(CALL, 0)]}
        return self.said(json.dumps({"name": CALL.name, "arguments": CALL.arguments}))

    def written(self, message: Message) -> list[int]:
        """Return the ids that a model would write of a message, with the stop token of the template's own."""
        prompt = self.chat.render(QUESTION).removesuffix(self.chat.opening)
        text = self.chat.render([*QUESTION, message], generation_prompt=False).removeprefix(prompt)
        ids = self.chat.encode(text.removeprefix(self.chat.opening))
        end = next((place for place, one in enumerate(ids) if one in self.stops), None)
        if end is not None:
            return ids[: end + 1]
        following = self.tail(message, None, cut=True) or []
        return ids + (following[:1] if following[:1] and following[0] in self.stops else self.stops[:1])

    def tail(self, message: Message, stop: int | None, cut: bool = False) -> list[int] | None:
        """Return what `ChatTemplate.tail` does with what follows such a message: a tool's result, or a question."""
        new = [_result(message)] if message.get("tool_calls") else QUESTION
        try:
            return self.chat.tail(message, new, stop, cut)
        except Refused:
            return self.chat.tail(message, as_users(new), stop, cut)

    def _reply(self, talk: Conversation, message: Message) -> Message:
        ids = self.written(message)
        self.stretches.append(Stretch("model", ids, trained=True))
        return talk.reply(ids, None, truncated=False)

    def _extend(self, talk: Conversation, what: str, message: Message) -> None:
        before, forks = len(talk.next_prompt), talk.forks
        talk.extend([message])
        forked = talk.forks > forks
        added = talk.next_prompt if forked else talk.next_prompt[before:]
        self.stretches.append(Stretch(f"{what}: a further row, all rendered anew" if forked else what, added))


def _result(message: Message) -> Message:
    """What the tool answers to a call."""
    number = message.get("tool_calls", [{"id": "call00000"}])[0]["id"]
    return {"role": "tool", "tool_call_id": number, "name": CALL.name, "content": "5"}


def check_chat(config: Config) -> None:
    """Print the tokens of a short conversation with a tool, which of them are trained on, and what makes a row end.

    Raises:
        UserError: no tokenizer or chat template, or one that has no words for a conversation.
        ConfigError: `rollout.tool_parser` does not read calls as the chat template writes them.
    """
    tokenizer = load_tokenizer(config.model)
    chat = ChatTemplate(
        tokenizer, tools=[TOOL], parser=config.rollout.tool_parser, arguments=config.data.chat_template_args
    )
    trial = Trial(chat, stop_tokens(config.model, tokenizer))
    talk = trial.play()
    console = Console()
    console.print(_tokens_table(trial))
    console.print(_facts_table(trial, talk, config))
    _check_parser(trial, config.rollout.tool_parser)


def _tokens_table(trial: Trial) -> Table:
    table = Table("", "tokens", "trained on", "text", title="a conversation of three turns", title_justify="left")
    for one in trial.stretches:
        text = trial.chat.decode(one.token_ids, special=True).replace("\n", "\\n")
        shown = text if len(text) <= SHOWN else f"...{text[-SHOWN:]}"
        trained = "yes" if one.trained else "no"
        style = "bold" if one.trained else "dim"
        table.add_row(escape(one.what), str(len(one.token_ids)), trained, escape(shown), style=style)
    return table


def _facts_table(trial: Trial, talk: Conversation, config: Config) -> Table:
    chat, forks = trial.chat, talk.forks
    shown = TOOL["function"]["name"] in chat.render(QUESTION)
    template = str(chat.tokenizer.get_chat_template(tools=chat.tools))
    parser = parsers.named(config.rollout.tool_parser, template)
    facts = {
        "what is sent": "begins with all that came before, at each turn"
        if not forks
        else f"does not begin with what came before at {forks} of 2 turns: the episode goes on in a further row",
        "tools": "described by the template" if shown else "not described by the template: do it in data.system_prompt",
        "calls": "in a form of the template's own"
        if chat.shows_calls
        else "not in the template: bare JSON is expected",
        "parser": parser + (" (auto)" if config.rollout.tool_parser == "auto" else ""),
        "results of tools": "messages of a tool"
        if any(message["role"] == "tool" for message in talk.messages)
        else "messages of the user: the template knows no tools",
        "thinking in <think> tags": "kept"
        if trial.keeps_thinking
        else "taken back when the user speaks again: the episode goes on in a further row",
    } | {f"stop token {text}": what for text, what in _stops(trial)}
    table = Table(title="chat template", show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(escape(name), escape(value))
    return table


def _stops(trial: Trial) -> list[tuple[str, str]]:
    """Each stop token with what becomes of it in the history."""
    answers = [(trial.call(), "a call"), (trial.said("5"), "an answer")]
    found = []
    for stop in trial.stops:
        after = [what for message, what in answers if trial.tail(message, stop) is not None]
        ends = f"ends {' and '.join(after)}" if after else "taken back: the episode goes on in a further row"
        found.append((trial.chat.decode([stop], special=True), ends))
    return found


def _check_parser(trial: Trial, name: str) -> None:
    chat, ids = trial.chat, trial.written(trial.call())
    text, whole = chat.decode(ids), chat.decode(ids[:-1], special=True)

    def reads(parser: parsers.Parser) -> bool:
        return parsers.parse(parser, whole if parser.special else text, [TOOL]).calls == [CALL]

    if not reads(chat.parser):
        found = parsers.choose("auto", str(chat.tokenizer.get_chat_template(tools=chat.tools)))
        valid = ", ".join(key for key, one in {"auto": found, **PARSERS}.items() if reads(one)) or "none of them"
        raise ConfigError("rollout.tool_parser", f"'{name}' does not read the call {text!r}; what reads it: {valid}")
