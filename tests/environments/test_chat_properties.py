"""Random conversations over templates of every kind: what is sent, what is trained on, when an episode forks."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from environments.chats import ADD, FORMATS, Format, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_rl.environments.chat import ChatTemplate, Conversation
from sapo_rl.environments.parsers import PARSERS, parse
from sapo_rl.types import Row

SMOLLM = Path(__file__).parents[2] / ".cache" / "models" / "SmolLM2-135M-Instruct"

words = st.lists(st.sampled_from(["seven", "higher", "12", "ok?", "<b>", '"']), min_size=1, max_size=4).map(" ".join)
arguments = st.fixed_dictionaries({"a": st.integers(-9, 9), "b": st.integers(0, 99)})
turns = st.lists(
    st.tuples(words, st.none() | arguments, st.booleans(), st.integers(1, 2), words), min_size=1, max_size=6
)
"""Of each turn: what the model says, what it calls instead, whether it is cut, how many messages answer it, and how."""


@cache
def template_of(name: str, tools: bool) -> ChatTemplate:
    return ChatTemplate(tokenizer_of(FORMATS[name]), tools=[ADD] if tools else None)


class Watched:
    """A conversation that writes down what it sends and what is sampled."""

    def __init__(self, chat: ChatTemplate, messages: list[dict[str, Any]]) -> None:
        self.talk: Conversation = chat.begin(chat.start(messages), messages)
        self.sampled: list[list[int]] = []
        self.logps: list[float] = []

    def write(self, text: str, cut: bool = False) -> dict[str, Any]:
        chat = self.talk.template
        ids = chat.encode(text)
        ids = ids[: max(1, len(ids) // 2)] if cut else ids
        logps = [-0.01 * (len(self.logps) + place) for place in range(len(ids))]
        self.sampled.append(ids)
        self.logps += logps
        return self.talk.reply(ids, logps, cut)

    def hear(self, messages: list[dict[str, Any]]) -> None:
        """Extend, and check that what is sent begins with what was sent and sampled, unless that is counted."""
        before, forks = self.talk.next_prompt, self.talk.forks
        grown = self.talk.extend(messages)
        assert len(self.talk.next_prompt) == len(before) + grown
        assert self.talk.forks == forks + (self.talk.next_prompt[: len(before)] != before)

    def check(self) -> None:
        """Every sampled token is trained on once, and nothing else; ids and log-probabilities are the engine's."""
        rows = self.talk.rows()
        assert [ids for row in rows for ids in trained(row)] == self.sampled
        assert [logp for row in rows for logp in row.rollout_logps or []] == self.logps
        for turn, ids in zip(self.talk.turns(), self.sampled, strict=True):
            assert rows[turn.row].token_ids[turn.start : turn.end] == ids


def trained(row: Row) -> list[list[int]]:
    spans = [(0, len(row.token_ids))] if row.loss_mask is None else row.loss_mask
    return [row.token_ids[start:end] for start, end in spans]


def answers(message: dict[str, Any], count: int, text: str, tools: bool) -> list[dict[str, Any]]:
    if calls := message.get("tool_calls"):
        return [{"role": "tool", "tool_call_id": calls[0]["id"], "name": "add", "content": text}] * count
    return [{"role": "tool" if tools and count == 2 else "user", "content": text}]


def converse(form: Format, chat: ChatTemplate, script: list[Any], exact: bool) -> Conversation:
    """Play a script; `exact` wants what is sent to be what the template renders of the whole transcript."""
    watched = Watched(chat, [{"role": "system", "content": "play"}, {"role": "user", "content": "go"}])
    for text, call, cut, count, heard in script:
        message = watched.write(form.written(text, call if form.call and chat.tools else None), cut)
        assert cut or bool(message.get("tool_calls")) == bool(call and form.call and chat.tools)
        watched.hear(answers(message, count, heard, chat.tools is not None))
        if exact:
            sent, whole = chat.decode(watched.talk.next_prompt, special=True), chat.render(watched.talk.messages)
            assert sent == whole or (form.trims and "".join(sent.split()) == "".join(whole.split()))
    watched.write(form.written("done"))
    watched.check()
    return watched.talk


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("name", ["tiny", "qwen2_5", "qwen3", "gemma3", "llama3"])
@settings(max_examples=25, deadline=None)
@given(script=turns)
def test_a_stable_template_gives_one_row_that_is_the_whole_transcript(
    name: str, tools: bool, script: list[Any]
) -> None:
    talk = converse(FORMATS[name], template_of(name, tools), script, exact=True)
    assert talk.forks == 0 and len(talk.rows()) == 1


@pytest.mark.parametrize("name", ["glm4_5", "deepseek_v3", "deepseek_v31", "gemma4", "functiongemma"])
@settings(max_examples=25, deadline=None)
@given(script=turns)
def test_turns_with_calls_give_one_row_that_is_the_whole_transcript(name: str, script: list[Any]) -> None:
    uncut = [(text, call, False, 1, heard) for text, call, _, _, heard in script]
    assert converse(FORMATS[name], template_of(name, True), uncut, exact=True).forks == 0


@pytest.mark.skipif(not SMOLLM.exists(), reason="needs SmolLM2: sapo-train config=quickstart makes it")
@settings(max_examples=25, deadline=None)
@given(script=turns)
def test_smollm2_gives_one_row_that_is_the_whole_transcript(script: list[Any]) -> None:
    assert converse(FORMATS["tiny"], smollm(), script, exact=True).forks == 0


@cache
def smollm() -> ChatTemplate:
    from transformers import AutoTokenizer

    return ChatTemplate(AutoTokenizer.from_pretrained(SMOLLM))


@settings(max_examples=25, deadline=None)
@given(script=turns)
def test_gpt_oss_forks_after_each_answer_and_not_after_a_call(script: list[Any]) -> None:
    talk = converse(
        FORMATS["gpt_oss"], template_of("gpt_oss", True), [(*one[:2], False, 1, one[4]) for one in script], exact=True
    )
    assert talk.forks == sum(call is None for _, call, *_ in script)  # <|return|> is <|end|> in the history


@settings(max_examples=40, deadline=None)
@given(script=turns, thinks=st.lists(st.booleans(), min_size=6, max_size=6))
def test_thinking_that_the_template_strips_forks_when_it_does(script: list[Any], thinks: list[bool]) -> None:
    form, chat = FORMATS["qwen3"], template_of("qwen3", True)
    watched = Watched(chat, [{"role": "user", "content": "go"}])
    pending = False
    for (text, call, _, _, heard), thinking in zip(script, thinks, strict=False):
        before = watched.talk.forks
        message = watched.write(
            ("<think>\nhm, let me see\n</think>\n\n" if thinking else "") + form.written(text, call)
        )
        pending |= thinking
        watched.hear(answers(message, 1, heard, tools=True))
        stripped = pending and call is None
        assert watched.talk.forks == before + stripped
        pending &= not stripped
        assert chat.decode(watched.talk.next_prompt, special=True) == chat.render(watched.talk.messages)
    watched.write(form.written("done"))
    watched.check()


pieces = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        '{"name": "add", "arguments": {"a": 1, "b": 2}}',
        "[add(a=1)]",
        "{",
        "}",
        "[",
        "```json",
        "```",
        "<think>",
        "</think>",
        "<|channel|>",
        "analysis",
        " to=functions.add",
        "<|message|>",
        "<|end|>",
        "<|call|>",
        "seven",
        "\n",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<function=add>",
        "<parameter=a>",
        "<arg_key>",
        "</arg_value>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<start_function_call>",
        "<|tool_call>",
        "call:add{a:1}",
        '<|"|>',
        "<|channel>thought",
        "<|python_tag|>",
        '"\\ud800"',
        "[add(a={[]: 1})]",
        '{"name": "add", "arguments": {"a": "\\ud800"}}',
    ]
)
anything = st.lists(pieces, max_size=8).map("".join)


@pytest.mark.parametrize("name", [*FORMATS])
@settings(max_examples=40, deadline=None)
@given(said=st.lists(st.tuples(anything, st.booleans(), st.booleans()), min_size=1, max_size=4))
def test_whatever_a_model_writes_is_kept_and_goes_on(name: str, said: list[tuple[str, bool, bool]]) -> None:
    watched = Watched(template_of(name, True), [{"role": "user", "content": "go"}])
    for text, stops, tool in said:
        message = watched.write(text + FORMATS[name].stop if stops else text + "x", cut=not stops)
        watched.hear(answers(message, 2 if tool else 1, "\ud800", tools=True))
    watched.write("done" + FORMATS[name].stop)
    watched.check()


@pytest.mark.parametrize("name", [*PARSERS])
@settings(max_examples=60, deadline=None)
@given(text=anything | st.text(max_size=40))
def test_no_text_makes_a_parser_fail(name: str, text: str) -> None:
    found = parse(PARSERS[name], text)
    assert not (found.calls and found.problem)
