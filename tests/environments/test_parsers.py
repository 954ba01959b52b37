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

GLM = (
    "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
    "<arg_key>b</arg_key>\n<arg_value>[2]</arg_value>\n</tool_call>"
)
V3 = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1, "b": [2]}\n```<｜tool▁call▁end｜>'
V31 = '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": [2]}<｜tool▁call▁end｜>'
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


@pytest.mark.parametrize(
    ("parser", "text", "content", "calls"),
    [
        ("glm45", f"Well.\n{GLM}\n{GLM}", "Well.", [ADD, ADD]),
        ("glm47", GLM.replace("\n", ""), "", [ADD]),
        ("glm45", "<tool_call>now</tool_call>", "", [Call("now", {})]),
        (
            "glm45",
            "<tool_call>f<arg_key>code</arg_key><arg_value>x = 1\ny = 2</arg_value></tool_call>",
            "",
            [Call("f", {"code": "x = 1\ny = 2"})],
        ),
        ("deepseek_v3", f"Well.{BEGIN}{V3}\n{V3}{END}", "Well.", [ADD, ADD]),
        ("deepseek_v31", f"{BEGIN}{V31}{V31}{END}", "", [ADD, ADD]),
        ("deepseek_v31", f"{BEGIN}{V31}", "", [ADD]),
        ("deepseek_v3", "So", "So", []),
        (
            "functiongemma",
            "<start_function_call>call:f{a:<escape>x{y: 1}<escape>,b:1.5,c:true}<end_function_call>",
            "",
            [Call("f", {"a": "x{y: 1}", "b": 1.5, "c": True})],
        ),
        (
            "functiongemma",
            "<start_function_call>call:now{}<end_function_call><start_function_call>call:add{a:1,b:[2]}",
            "",
            [Call("now", {}), ADD],
        ),
        ("gemma4", "Well. <|tool_call>call:add{a:1,b:[2]}<tool_call|>", "Well.", [ADD]),
        (
            "gemma4",
            '<|tool_call>call:f{at:{x:1,when:<|"|>12:30, "noon"<|"|>},b:[<|"|>{c:1}<|"|>,-2]}<tool_call|>',
            "",
            [Call("f", {"at": {"x": 1, "when": '12:30, "noon"'}, "b": ["{c:1}", -2]})],
        ),
        ("pythonic", "So:\n```tool_code\nadd(a=1, b=[2])\n```", "So:", [ADD]),
        ("pythonic", "```tool_code\nprint(add(a=1, b=[2]))\nx = add(a=1, b=[2])\n```", "", [ADD, ADD]),
        ("pythonic", "```python\nadd(a=1)\n```", "```python\nadd(a=1)\n```", []),
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
        ("glm45", "<tool_call>I add<arg_key>a</arg_key></tool_call>", "must be NAME, with <arg_key>KEY"),
        ("deepseek_v3", f"{BEGIN}<｜tool▁call▁begin｜>function<｜tool▁sep｜>add {{", "no valid JSON"),
        ("deepseek_v31", f"{BEGIN}<｜tool▁call▁begin｜>add", "no valid JSON"),
        ("functiongemma", "<start_function_call>add(a=1)", "must be call:NAME{KEY:VALUE,...}, with <escape> around"),
        ("gemma4", "<|tool_call>call:add{a:one}<tool_call|>", "no valid JSON"),
        ("pythonic", "```tool_code\nfor x in y: pass\n```", r"must be NAME\(ARGUMENT=VALUE, ...\)"),
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
    gemma = (
        "<|channel>thought\nhm <|tool_call>call:no{}<tool_call|>\n<channel|><|tool_call>call:add{a:1,b:[2]}<tool_call|>"
    )
    assert parse(PARSERS["gemma4"], gemma) == Parsed("", [ADD], thinking="hm <|tool_call>call:no{}<tool_call|>")


@pytest.mark.parametrize("text", [LLAMA, f"[TOOL_CALLS][{JSON}]", GLM, f"{BEGIN}{V3}{END}"])
def test_without_tools_nothing_is_a_call(text: str) -> None:
    for template in ("<|python_tag|>", "[TOOL_CALLS]", "<arg_key>", BEGIN):
        assert parse(choose("auto", template, tools=False), text) == Parsed(text, [])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>f" + "<arg_key>" * 50_000,
        "<tool_call>f" + "<arg_key>a</arg_key>" * 50_000,
        "<tool_call>f" + "<arg_key>a</arg_key><arg_value>" * 30_000,
        "<tool_call>f" + " " * 200_000 + "x",
        "<tool_call>f" + "<arg_key>a</arg_key><arg_value>1</arg_value>" * 20_000,
        "<tool_call><function=f>" + "<parameter=a>" * 50_000 + "</function>",
        "```" + "a" * 100_000 + " " * 100_000,
        "```tool_code" + " " * 100_000,
        "<|tool_call>call:f{" + "} " * 100_000,
        "<|channel>" * 50_000,
    ],
    ids=["keys", "no values", "values", "spaces", "pairs", "parameters", "fence", "tool_code", "braces", "channels"],
)
@pytest.mark.parametrize("parser", PARSERS)
def test_a_reply_that_repeats_itself_is_read_in_time_that_grows_with_its_length(parser: str, text: str) -> None:
    assert parse(PARSERS[parser], text).content is not None  # minutes where the time grows with the square


@pytest.mark.parametrize(
    "written",
    [
        "f<arg_key>a</arg_key>",
        "f<arg_key>a</arg_key>words<arg_value>1</arg_value>",
        "f<arg_key>a</arg_key><arg_value>1</arg_value>words<arg_key>b</arg_key><arg_value>1</arg_value>",
        "f<arg_key>a</arg_key><arg_value>1",
    ],
)
def test_a_call_of_glm_with_words_between_or_no_end_is_told_to_the_model(written: str) -> None:
    text = f"<tool_call>{written}</tool_call>"
    found = parse(PARSERS["glm45"], text)
    assert (found.content, found.calls) == (text, [])
    assert "<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>" in found.problem


@pytest.mark.parametrize(
    ("name", "parser"),
    [
        ("tiny", "json"),
        ("qwen2_5", "hermes"),
        ("qwen3", "hermes"),
        ("llama3", "llama3_json"),
        ("gpt_oss", "openai"),
        ("gemma3", "json"),
        ("glm4_5", "glm45"),
        ("deepseek_v3", "deepseek_v3"),
        ("deepseek_v31", "deepseek_v3"),
        ("gemma4", "gemma4"),
        ("functiongemma", "functiongemma"),
    ],
)
def test_auto_reads_what_the_template_speaks_of(name: str, parser: str) -> None:
    assert named("auto", str(tokenizer_of(FORMATS[name]).chat_template)) == parser


@pytest.mark.parametrize(
    ("name", "tag", "tagged"),
    [("hermes", "<tool_call>", f"<tool_call>{JSON}</tool_call>"), ("deepseek_v3", BEGIN, f"{BEGIN}{V31}{END}")],
)
def test_auto_reads_bare_json_where_the_template_asks_for_tags(name: str, tag: str, tagged: str) -> None:
    parser = choose("auto", tag)
    assert parse(parser, JSON).calls == parse(parser, tagged).calls == [ADD]
    assert parse(choose(name, ""), JSON).calls == []


def test_an_unknown_parser_is_refused() -> None:
    with pytest.raises(UserError, match=r"rollout.tool_parser: unknown value 'hermess'; .*hermes"):
        choose("hermess", "")
