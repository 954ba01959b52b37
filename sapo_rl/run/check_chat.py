"""`check=chat`: what the model's chat template does with a conversation of three turns and a tool, token by token.

The tools are those of the config and its environments, where there are some, else one that adds two numbers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sapo_rl.config import Config
from sapo_rl.environments import parsers
from sapo_rl.environments.chat import ChatTemplate, Conversation, Refused
from sapo_rl.environments.messages import Message, as_users, tool_call
from sapo_rl.environments.parsers import PARSERS, Call
from sapo_rl.environments.runner.pool import EnvironmentPool
from sapo_rl.policy.model import load_tokenizer, stop_tokens
from sapo_rl.rollout.episode import opened
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
VALUES = {"string": "some text", "integer": 2, "number": 2.5, "boolean": True, "null": None}
"""What the arguments of a call are, by the type in the tool's schema."""
THOUGHT = "<think>\nLet me see.\n</think>\n\n"
SHOWN = 160
"""Characters shown of a stretch of tokens, from its end; of the prompt, which describes the tools, `PROMPT`."""
PROMPT = 4000


@dataclass(frozen=True)
class Script:
    """What is said in the conversation, and the tools that there are."""

    tools: list[dict[str, Any]]
    call: Call
    question: str
    result: str
    answers: tuple[str, str]
    further: str
    """The second question."""
    about: str
    """Whose tools they are."""


EXAMPLE = Script(
    tools=[TOOL],
    call=Call("add_numbers", {"a": 2, "b": 3}),
    question="What is 2 + 3?",
    result="5",
    answers=("It is 5.", "It is 10."),
    further="And twice that?",
    about="a tool for example",
)


def script_of(tools: list[dict[str, Any]], about: str) -> Script:
    """Return a conversation in which the first of some tools, in OpenAI's form, is called."""
    function = tools[0]["function"]
    call = Call(function["name"], value_of(function["parameters"]))
    return Script(tools, call, f"Call {call.name}.", "a result", ("It is done.", "There is no need."), "Again?", about)


def value_of(schema: dict[str, Any]) -> Any:
    """Return a value that a JSON schema admits: the first of its choices; of an object all properties.

    Example:
        >>> value_of({"type": "object", "properties": {"city": {"type": "string"}, "days": {"enum": [3, 5]}}})
        {'city': 'some text', 'days': 3}
    """
    if schema.get("enum"):
        return schema["enum"][0]
    if schema.get("anyOf"):
        return value_of(schema["anyOf"][0])
    kind = schema.get("type", "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        return {name: value_of(one) for name, one in schema.get("properties", {}).items()}
    return [value_of(schema.get("items", {}))] if kind == "array" else VALUES.get(kind, "some text")


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
    script: Script
    system_prompt: str | None
    stretches: list[Stretch] = field(default_factory=list)

    def play(self) -> Conversation:
        """Have the model write what its template would write of it, and note every stretch of tokens."""
        talk = self.chat.begin(self.chat.start(self.opening), self.opening)
        self.stretches = [Stretch("prompt", talk.next_prompt)]
        message = self._reply(talk, self.call())
        self._extend(talk, "tool", self._result(message))
        self._reply(talk, self.said(self.script.answers[0]))
        self._extend(talk, "user", {"role": "user", "content": self.script.further})
        self._reply(talk, self.said(self.script.answers[1]))
        return talk

    @property
    def opening(self) -> list[Message]:
        """The messages before the first reply."""
        return opened(self.script.question, self.system_prompt, None)

    @property
    def describes_tools(self) -> bool:
        """Whether the template has words for tools, in a conversation that does not name any by itself."""
        return self.script.call.name in self.chat.render([{"role": "user", "content": "?"}])

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
            return self.said("") | {"tool_calls": [tool_call(self.script.call, 0)]}
        return self.said(json.dumps({"name": self.script.call.name, "arguments": self.script.call.arguments}))

    def written(self, message: Message) -> list[int]:
        """Return the ids that a model would write of a message, with the stop token of the template's own."""
        prompt = self.chat.render(self.opening).removesuffix(self.chat.opening)
        text = self.chat.render([*self.opening, message], generation_prompt=False).removeprefix(prompt)
        ids = self.chat.encode(text.removeprefix(self.chat.opening))
        end = next((place for place, one in enumerate(ids) if one in self.stops), None)
        if end is not None:
            return ids[: end + 1]
        following = self.tail(message, None, cut=True) or []
        return ids + (following[:1] if following[:1] and following[0] in self.stops else self.stops[:1])

    def tail(self, message: Message, stop: int | None, cut: bool = False) -> list[int] | None:
        """Return what `ChatTemplate.tail` does with what follows such a message: a tool's result, or a question."""
        asked = {"role": "user", "content": self.script.further}
        new = [self._result(message) if message.get("tool_calls") else asked]
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

    def _result(self, message: Message) -> Message:
        """What the tool answers to a call."""
        number = message.get("tool_calls", [{"id": "call00000"}])[0]["id"]
        return {"role": "tool", "tool_call_id": number, "name": self.script.call.name, "content": self.script.result}


def check_chat(config: Config) -> None:
    """Print the tokens of a short conversation with a tool, which of them are trained on, and what makes a row end.

    Where there are several environments with tools, of each.

    Raises:
        UserError: no tokenizer or chat template, or one that has no words for a conversation; or the config's tools, or
            an environment, cannot be made.
        ConfigError: `rollout.tool_parser` does not read calls as the chat template writes them.
    """
    tokenizer = load_tokenizer(config.model)
    parser, arguments = config.rollout.tool_parser, config.data.chat_template_args
    console = Console()
    for script in list(_scripts(config)) or [EXAMPLE]:
        chat = ChatTemplate(tokenizer, tools=script.tools, parser=parser, arguments=arguments)
        trial = Trial(chat, stop_tokens(config.model, tokenizer), script, config.data.system_prompt)
        talk = trial.play()
        console.print(_tokens_table(trial))
        console.print(_facts_table(trial, talk, config))
        _check_parser(trial, parser)


def _scripts(config: Config) -> Iterator[Script]:
    """A conversation for each environment, or for the tools alone, that has tools to call."""
    for name in config.played:
        environments = EnvironmentPool(config, name, workers=1)
        asyncio.run(environments.look())
        if environments.schemas:
            yield script_of(environments.schemas, f"the tools of {environments.key}" if name else "the config's tools")


def _tokens_table(trial: Trial) -> Table:
    table = Table("", "tokens", "trained on", "text", title_justify="left")
    table.title = f"a conversation of three turns with {escape(trial.script.about)}"
    for one in trial.stretches:
        text = trial.chat.decode(one.token_ids, special=True).replace("\n", "\\n")
        most = PROMPT if one is trial.stretches[0] else SHOWN
        shown = text if len(text) <= most else f"...{text[-most:]}"
        trained = "yes" if one.trained else "no"
        style = "bold" if one.trained else "dim"
        table.add_row(escape(one.what), str(len(one.token_ids)), trained, escape(shown), style=style)
    return table


def _facts_table(trial: Trial, talk: Conversation, config: Config) -> Table:
    chat, forks = trial.chat, talk.forks
    template = str(chat.tokenizer.get_chat_template(tools=chat.tools))
    parser = parsers.named(config.rollout.tool_parser, template)
    facts = {
        "what is sent": "begins with all that came before, at each turn"
        if not forks
        else f"does not begin with what came before at {forks} of 2 turns: the episode goes on in a further row",
        "tools": "described by the template"
        if trial.describes_tools
        else "not described by the template: do it in data.system_prompt",
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
        return parsers.parse(parser, whole if parser.special else text, trial.script.tools).calls == [trial.script.call]

    if not reads(chat.parser):
        found = parsers.choose("auto", str(chat.tokenizer.get_chat_template(tools=chat.tools)))
        valid = ", ".join(key for key, one in {"auto": found, **PARSERS}.items() if reads(one)) or "none of them"
        raise ConfigError("rollout.tool_parser", f"'{name}' does not read the call {text!r}; what reads it: {valid}")
