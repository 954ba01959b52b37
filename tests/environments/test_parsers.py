"""Replies read for calls of tools, by format: what is found, what is content, what is told to the model."""

from __future__ import annotations

import re

import pytest
from environments.chats import FORMATS, tokenizer_of

from sapo_rl.environments.parsers import PARSERS, Call, Parsed, choose, named, parse
from sapo_rl.errors import UserError

ADD = Call("add", {"a": 1, "b": [2]})
JSON = '{"name": "add", "arguments": {"a": 1, "b": [2]}}'
LLAMA = '{"name": "add", "parameters": {"a": 1, "b": [2]}}'
XML = (
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n"
    "<parameter=b>\n[2]\n</parameter>\n</function>\n</tool_call>"
)


@pytest.mark.parametrize(
    ("parser", "text", "content", "calls"),
    [
        ("hermes", f"<tool_call>\n{JSON}\n</tool_call>", "", [ADD]),
        ("hermes", f"Well.\n<tool_call>{JSON}</tool_call><tool_call>{JSON}", "Well.", [ADD, ADD]),
        ("hermes", f"I write {JSON}", f"I write {JSON}", []),
        ("json", JSON, "", [ADD]),
        ("json", f"[{JSON}, {JSON}]", "", [ADD, ADD]),
        ("json", f"{JSON}\n{JSON}\nDone.", "Done.", [ADD, ADD]),
        ("json", f"First:\n```json\n{JSON}\n```\nThen stop.", "First:\n\nThen stop.", [ADD]),
        ("json", f"```\n{JSON}\n```\n```json\n{JSON}\n```", "", [ADD, ADD]),
        ("json", '{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []),
        ("json", "```python\nprint({})\n```", "```python\nprint({})\n```", []),
        ("json", "12", "12", []),
        ("llama3_json", LLAMA, "", [ADD]),
        ("llama3_json", f"<|python_tag|>{LLAMA}; {LLAMA}", "", [ADD, ADD]),
        ("llama3_json", "It is {3}.", "It is {3}.", []),
        ("mistral", f"[TOOL_CALLS] [{JSON}]", "", [ADD]),
        ("mistral", 'So[TOOL_CALLS]add[ARGS]{"a": 1, "b": [2]}[TOOL_CALLS]add{"a": 1, "b": [2]}', "So", [ADD, ADD]),
        ("mistral", "So", "So", []),
        ("pythonic", "[add(a=1, b=[2]), math.add(a=-1)]", "", [ADD, Call("math.add", {"a": -1})]),
        ("pythonic", "[1, 2]", "[1, 2]", []),
        ("qwen3_coder", f"Well. {XML}", "Well.", [ADD]),
        ("qwen3_coder", "<tool_call><function=f></function></tool_call>", "", [Call("f", {})]),
        (
            "qwen3_coder",
            "<tool_call>\n<function=f>\n<parameter=code>\nx = 1\ny = 2\n</parameter>\n</function>\n</tool_call>",
            "",
            [Call("f", {"code": "x = 1\ny = 2"})],
        ),
    ],
)
def test_calls_are_found_and_the_rest_is_content(parser: str, text: str, content: str, calls: list[Call]) -> None:
    assert parse(PARSERS[parser], text) == Parsed(content, calls)


@pytest.mark.parametrize(
    ("parser", "text", "problem"),
    [
        ("hermes", '<tool_call>{"name": "add", </tool_call>', "the call of a tool is no valid JSON: Expecting"),
        (
            "hermes",
            '<tool_call>{"name": "add", "arguments": 3}</tool_call>',
            "the call of a tool must be a JSON object",
        ),
        ("hermes", "<tool_call>3</tool_call>", "the call of a tool must be a JSON object"),
        ("hermes", "<tool_call>" + "[" * 100_000, "the call of a tool is no valid JSON"),
        ("json", '{"name": "add", "arguments": {"a": 1}', "the call of a tool is no valid JSON: Expecting"),
        ("json", '```json\n{"name": "add", "arguments": {a: 1}}\n```', "the call of a tool is no valid JSON"),
        ("llama3_json", '{"name": 3, "parameters": {}}', 'must be a JSON object with "name", a text'),
        ("mistral", "[TOOL_CALLS]add[ARGS]{", "the call of a tool is no valid JSON"),
        ("pythonic", "[add(a=1", "the calls of tools are no valid Python"),
        ("pythonic", "[add(a=open('x'))]", "the calls of tools are no valid Python: malformed node"),
        ("pythonic", "[add(1)]", r"must be NAME\(ARGUMENT=VALUE, ...\)"),
        ("qwen3_coder", "<tool_call>add</tool_call>", "must be <function=NAME>"),
        ("json", '{"name": "add", "arguments": {"a": "\\ud800"}}', "holds one half of a character"),
        ("pythonic", "[add(a={1, 2})]", "holds what JSON does not: Object of type set"),
        ("pythonic", "[add(a={[]: 1})]", "no valid Python: unhashable"),
        ("openai", " to=functions.add<|channel|>commentary json<|message|>{a}", "no valid JSON"),
    ],
)
def test_a_malformed_call_is_told_and_stays_in_the_content(parser: str, text: str, problem: str) -> None:
    found = parse(PARSERS[parser], text)
    assert (found.content, found.calls) == (text, [])
    assert re.search(problem, found.problem)


def test_thinking_is_content_and_calls_in_it_are_none() -> None:
    thinking = f"<think>maybe <tool_call>{JSON}</tool_call></think>"
    assert parse(PARSERS["hermes"], f"{thinking}12") == Parsed(f"{thinking}12", [])
    assert parse(PARSERS["hermes"], f"{thinking}<tool_call>{JSON}</tool_call>") == Parsed(thinking, [ADD])
    cut = f"<think>maybe <tool_call>{JSON}</tool_call>"
    assert parse(PARSERS["hermes"], cut) == Parsed(cut, [])


def test_text_of_a_format_without_types_is_what_the_tool_wants() -> None:
    text = XML.replace("[2]", "[2")
    schema = {"function": {"name": "add", "parameters": {"properties": {"a": {"type": "string"}}}}}
    assert parse(PARSERS["qwen3_coder"], text).calls == [Call("add", {"a": 1, "b": "[2"})]
    assert parse(PARSERS["qwen3_coder"], text, [schema]).calls == [Call("add", {"a": "1", "b": "[2"})]


def test_channels_are_taken_apart() -> None:
    said = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    call = f'{said} to=functions.add<|channel|>commentary json<|message|>{{"a": 1, "b": [2]}}<|call|>'
    assert parse(PARSERS["openai"], call) == Parsed("", [ADD], thinking="hm")
    answer = f"{said}<|channel|>final<|message|>12<|return|>"
    assert parse(PARSERS["openai"], answer) == Parsed("12", [], thinking="hm")


@pytest.mark.parametrize(
    ("name", "parser"),
    [("tiny", "json"), ("qwen2_5", "hermes"), ("qwen3", "hermes"), ("llama3", "llama3_json"), ("gpt_oss", "openai")],
)
def test_auto_reads_what_the_template_speaks_of(name: str, parser: str) -> None:
    assert named("auto", str(tokenizer_of(FORMATS[name]).chat_template)) == parser


def test_auto_reads_bare_json_where_the_template_asks_for_tags() -> None:
    parser = choose("auto", "<tool_call>")
    assert parse(parser, JSON).calls == parse(parser, f"<tool_call>{JSON}</tool_call>").calls == [ADD]
    assert parse(choose("hermes", ""), JSON).calls == []


def test_an_unknown_parser_is_refused() -> None:
    with pytest.raises(UserError, match=r"rollout.tool_parser: unknown value 'hermess'; .*hermes"):
        choose("hermess", "")
