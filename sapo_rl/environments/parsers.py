"""What a model wrote, read for calls of tools: text in, content and calls out. The names are vLLM's."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from sapo_rl.errors import UserError, did_you_mean
from sapo_rl.errors.own_code import is_dict, is_list


class Call(NamedTuple):
    """One call of a tool, as the model wrote it."""

    name: str
    arguments: dict[str, Any]


class Parsed(NamedTuple):
    """A reply taken apart."""

    content: str
    """What is no call; the whole text where a call is malformed."""
    calls: list[Call]
    """In their order; empty where there is none, or where one is malformed."""
    problem: str = ""
    """What is wrong with a call, in words for the model; empty where nothing is."""
    thinking: str | None = None
    """What the model thought, where its format has a channel for that, else None: thinking in tags is content."""


class Parser(NamedTuple):
    """How a format is read."""

    read: Callable[[str], Parsed]
    special: bool = False
    """Whether it reads special tokens: they are left out of the text otherwise."""
    untyped: bool = False
    """Whether the format has text for every value: the tools' schemas say what it stands for."""
    channels: bool = False
    """Whether it tells thoughts from content; others have nothing to read where there are no tools."""


class Malformed(Exception):
    """A call that cannot be read; the text is for the model."""


_SHAPE = 'must be a JSON object with "name", a text, and "arguments", an object'
# Nothing is tried twice (`*+`, `(?>`): what a model repeats a thousand times must not take the square of that.
_FENCE = re.compile(r"```\w*+[ \t]*+\n?+(.*?)```", re.DOTALL)
_HALF = re.compile("[\ud800-\udfff]")
_ENDS = re.compile(r"<\|(?:end|call|return)\|>")
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>(?>(.*?)</arg_key>)\s*+<arg_value>(?>(.*?)</arg_value>)\s*+", re.DOTALL)
_NAMED_FENCE = re.compile(r"\s*(\S+)\s*```(?:json)?\s(.*?)```\s*", re.DOTALL)
_TOOL_CODE = re.compile(r"```tool_code[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_GEMMA_CALL = re.compile(r"\s*call:([\w.-]+)\s*(\{.*\})\s*", re.DOTALL)
_BARE_KEY = re.compile(r"([{,]\s*)([\w.-]+)\s*:")
_THOUGHT = re.compile(r"<\|channel>(?:thought\n)?(.*?)(?:<channel\|>|\Z)", re.DOTALL)


def parse(parser: Parser, text: str, tools: Sequence[dict[str, Any]] = ()) -> Parsed:
    """Take a reply apart; what stands before `</think>` is content whatever it holds, as is thinking without an end.

    `tools` are the schemas.

    Example:
        >>> parse(PARSERS["hermes"], 'Well: <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
        Parsed(content='Well:', calls=[Call(name='add', arguments={'a': 1})], problem='', thinking=None)
    """
    thought, end, said = text.rpartition("</think>")
    if not end and said.lstrip().startswith("<think>"):
        return Parsed(text, [])
    try:
        found = parser.read(said)
    except Malformed as error:
        return Parsed(text, [], str(error))
    if parser.untyped:
        found = found._replace(calls=[_typed(call, tools) for call in found.calls])
    return found._replace(content=thought + end + found.content) if end else found


def _hermes(text: str) -> Parsed:
    """JSON objects between `<tool_call>` and `</tool_call>`; the last end may be missing."""
    return _tagged(text, lambda written: _calls(_load(written)))


def _qwen3_coder(text: str) -> Parsed:
    """`<function=NAME>` with a `<parameter=NAME>` each, between `<tool_call>` and `</tool_call>`."""
    return _tagged(text, _function)


def _tagged(text: str, read: Callable[[str], list[Call]]) -> Parsed:
    before, *blocks = text.split("<tool_call>")
    if not blocks:
        return Parsed(text, [])
    parts = [before]
    calls: list[Call] = []
    for block in blocks:
        written, _, after = block.partition("</tool_call>")
        calls += read(written)
        parts.append(after)
    return Parsed("".join(parts).strip(), calls)


def _function(written: str) -> list[Call]:
    name = re.match(r"\s*<function=([^>\n]+)>", written)
    if not name or "</function>" not in written:
        raise Malformed("the call of a tool must be <function=NAME> ... </function> with a <parameter=NAME> each")
    closed = written[: written.rfind("</parameter>") + len("</parameter>")]  # what opens later has no end to look for
    return [Call(name[1], dict(_PARAMETER.findall(closed)))]


def _glm(text: str) -> Parsed:
    """A name with `<arg_key>` and `<arg_value>` each, between `<tool_call>` and `</tool_call>`; lines or none."""
    return _tagged(text, _glm_call)


def _glm_call(written: str) -> list[Call]:
    name = written.partition("<arg_key>")[0]
    end, arguments = len(name), dict[str, Any]()
    while found := _ARGUMENT.match(written, end):
        arguments[found[1].strip()], end = found[2], found.end()
    if end < len(written) or not re.fullmatch(r"[^\s<>{}]+", name.strip()):
        raise Malformed("the call of a tool must be NAME, with <arg_key>KEY</arg_key><arg_value>VALUE</arg_value> each")
    return [Call(name.strip(), arguments)]


def _typed(call: Call, tools: Sequence[dict[str, Any]]) -> Call:
    """The call with each text that its tool does not want as text read as JSON, where it is any."""
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    properties = functions.get(call.name, {}).get("parameters", {}).get("properties", {})
    return Call(call.name, {key: _value(text, properties.get(key, {})) for key, text in call.arguments.items()})


def _value(text: str, schema: dict[str, Any]) -> Any:
    if schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _bare_json(text: str) -> Parsed:
    """JSON objects with `name` and `arguments`, or lists of them: in fences, or else from the first character."""
    calls: list[Call] = []

    def take(fence: re.Match[str]) -> str:
        found = _calls(_load(fence[1])) if _looks_like_calls(fence[1]) else []
        calls.extend(found)
        return "" if found else fence[0]

    rest = _FENCE.sub(take, text)
    if calls or not _looks_like_calls(text):
        return Parsed(rest.strip() if calls else text, calls)
    values, rest = _sequence(text)
    return Parsed(rest, [call for value in values for call in _calls(value)])


def _llama3_json(text: str) -> Parsed:
    """JSON objects with `name` and `parameters`, apart by `;`, from the first character or after `<|python_tag|>`."""
    before, tag, written = text.partition("<|python_tag|>")
    written = written if tag else text
    if not _looks_like_calls(written):
        return Parsed(text, [])
    values, rest = _sequence(written)
    content = f"{before.strip()} {rest}".strip() if tag else rest
    return Parsed(content, [call for value in values for call in _calls(value)])


def _mistral(text: str) -> Parsed:
    """A JSON list after `[TOOL_CALLS]`, or a name and the JSON of its arguments after each."""
    before, *blocks = text.split("[TOOL_CALLS]")
    calls: list[Call] = []
    for block in blocks:
        name, brace, arguments = block.partition("{")
        if block.lstrip().startswith(("[", "{")):
            calls += _calls(_load(block))
        else:
            name = name.replace("[ARGS]", "").strip()
            calls += _calls({"name": name, "arguments": _load(brace + arguments)})
    return Parsed(before.strip() if calls else text, calls)


def _deepseek(text: str) -> Parsed:
    """DeepSeek's tags around each call: of V3 `function`, a name and JSON in a fence, of V3.1 a name and JSON."""
    before, begin, rest = text.partition("<｜tool▁calls▁begin｜>")
    if not begin:
        return Parsed(text, [])
    blocks, _, after = rest.partition("<｜tool▁calls▁end｜>")
    calls: list[Call] = []
    for block in blocks.split("<｜tool▁call▁begin｜>")[1:]:
        kind, _, written = block.partition("<｜tool▁call▁end｜>")[0].partition("<｜tool▁sep｜>")
        fence = _NAMED_FENCE.fullmatch(written)
        name, arguments = fence.groups() if fence else (kind.strip(), written)
        calls += _calls({"name": name, "arguments": _load(arguments)})
    return Parsed((before + after).strip(), calls)


def _functiongemma(text: str) -> Parsed:
    """`call:NAME{KEY:VALUE,...}` in FunctionGemma's tags."""
    return _gemma(text, "<start_function_call>", "<end_function_call>", "<escape>")


def _gemma4(text: str) -> Parsed:
    """The same in Gemma 4's tags, and what it thinks in a channel, which the prompt may have opened."""
    begun, end, _ = text.partition("<channel|>")
    if end and "<|channel>" not in begun:
        text = "<|channel>" + text
    thoughts = _THOUGHT.findall(text)
    found = _gemma(_THOUGHT.sub("", text), "<|tool_call>", "<tool_call|>", '<|"|>')
    return found._replace(thinking="\n".join(thoughts).strip()) if thoughts else found


def _gemma(text: str, begin: str, end: str, quote: str) -> Parsed:
    """Calls between tags; a text in one stands between two of the same `quote`, keys are bare."""
    before, *blocks = text.split(begin)
    parts, calls = [before], list[Call]()
    for block in blocks:
        written, _, after = block.partition(end)
        if (call := _GEMMA_CALL.fullmatch(written)) is None:
            raise Malformed(f"the call of a tool must be call:NAME{{KEY:VALUE,...}}, with {quote} around texts")
        pieces = enumerate(call[2].split(quote))
        json_text = "".join(json.dumps(one) if at % 2 else _BARE_KEY.sub(r'\1"\2":', one) for at, one in pieces)
        calls += _calls({"name": call[1], "arguments": _load(json_text)})
        parts.append(after)
    return Parsed("".join(parts).strip() if calls else text, calls)


def _pythonic(text: str) -> Parsed:
    """A Python list of calls with named arguments, such as `[add(a=1, b=2)]`, or calls in ```tool_code fences."""
    blocks, rest = _TOOL_CODE.findall(text), _TOOL_CODE.sub("", text).strip()
    if not blocks:
        if not re.match(r"\s*\[\s*[\w.]+\(", text):
            return Parsed(text, [])
        blocks, rest = [text], ""
    try:
        found = [_python_call(node) for block in blocks for node in _expressions(block)]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise Malformed(f"the calls of tools are no valid Python: {error}") from error
    return Parsed(rest, _calls(found))


def _expressions(written: str) -> Iterator[Any]:
    """What each line says, or a list in it, without a `print` or an assignment around it."""
    for statement in ast.parse(written.strip()).body:
        node = getattr(statement, "value", statement)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and len(node.args) == 1:
            node = node.args[0]
        yield from node.elts if isinstance(node, ast.List) else [node]


def _python_call(node: ast.expr) -> dict[str, Any]:
    if not isinstance(node, ast.Call) or node.args or any(one.arg is None for one in node.keywords):
        raise Malformed("the call of a tool must be NAME(ARGUMENT=VALUE, ...)")
    arguments = {one.arg: ast.literal_eval(one.value) for one in node.keywords if one.arg}
    return {"name": ast.unparse(node.func), "arguments": arguments}


def _openai(text: str) -> Parsed:
    """Harmony's channels, as gpt-oss writes them: analysis, commentary to a function, final."""
    said: dict[str, list[str]] = {"analysis": [], "final": []}
    calls: list[Call] = []
    for part in _ENDS.split(text):
        header, has_body, body = part.partition("<|message|>")
        to = re.search(r"to=functions\.([^\s<]+)", header)
        if not has_body:
            said["final"] += [header] if "<|" not in header and header.strip() else []
        elif to:
            calls += _calls({"name": to[1], "arguments": _load(body)})
        else:
            said["analysis" if "analysis" in header else "final"].append(body)
    return Parsed("\n".join(said["final"]), calls, thinking="\n".join(said["analysis"]))


def _looks_like_calls(written: str) -> bool:
    keys = ('"arguments"' in written or '"parameters"' in written) and '"name"' in written
    return keys and written.lstrip().startswith(("{", "["))


def _load(written: str) -> Any:
    try:
        return json.loads(written)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the call of a tool is no valid JSON: {error}") from error


def _sequence(text: str) -> tuple[list[Any], str]:
    """The JSON values that a text begins with, apart by space or `;`, and what comes after them."""
    values: list[Any] = []
    rest, decoder = text.strip(), json.JSONDecoder()
    while rest.startswith(("{", "[")):
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError) as error:
            raise Malformed(f"the call of a tool is no valid JSON: {error}") from error
        values.append(value)
        rest = rest[end:].lstrip(" \t\r\n;")
    return values, rest


def _calls(value: Any) -> list[Call]:
    """The calls in JSON's value: an object, or a list of them."""
    calls: list[Call] = []
    for one in value if is_list(value) else [value]:
        arguments = one.get("arguments", one.get("parameters", {})) if is_dict(one) else None
        if not is_dict(arguments) or not isinstance(one.get("name"), str):
            raise Malformed(f"the call of a tool {_SHAPE}")
        try:
            written = json.dumps(arguments, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise Malformed(f"the call of a tool holds what JSON does not: {error}") from error
        if _HALF.search(one["name"] + written):
            raise Malformed("the call of a tool holds one half of a character")
        calls.append(Call(one["name"], arguments))
    return calls


def _or_json(parser: Parser) -> Parser:
    """The parser, and bare JSON where it finds nothing: small models write that whatever the template asks for."""

    def read(text: str) -> Parsed:
        found = parser.read(text)
        return found if found.calls else _bare_json(text)

    return parser._replace(read=read)


PARSERS: dict[str, Parser] = {
    "deepseek_v3": Parser(_deepseek, special=True),
    "deepseek_v31": Parser(_deepseek, special=True),
    "functiongemma": Parser(_functiongemma, special=True),
    "gemma4": Parser(_gemma4, special=True, channels=True),
    "glm45": Parser(_glm, untyped=True),
    "glm47": Parser(_glm, untyped=True),
    "hermes": Parser(_hermes),
    "json": Parser(_bare_json),
    "llama3_json": Parser(_llama3_json, special=True),
    "mistral": Parser(_mistral, special=True),
    "openai": Parser(_openai, special=True, channels=True),
    "pythonic": Parser(_pythonic),
    "qwen3_coder": Parser(_qwen3_coder, untyped=True),
}
"""By vLLM's names; `json` is ours."""

_SIGNS = {
    "<|channel|>": "openai",
    "<function=": "qwen3_coder",
    "<arg_key>": "glm45",
    "<｜tool▁calls▁begin｜>": "deepseek_v3",
    "<start_function_call>": "functiongemma",
    "<|tool_call>": "gemma4",
    "<tool_call>": "hermes",
    "[TOOL_CALLS]": "mistral",
    "<|python_tag|>": "llama3_json",
    "<|tool_call_start|>": "pythonic",
}
_OR_JSON = {name: _or_json(PARSERS[name]) for name in ("deepseek_v3", "hermes")}


def named(name: str, chat_template: str) -> str:
    """Return the name of the parser: where that is `auto`, of the format that a chat template speaks of, else `json`.

    Raises:
        UserError: an unknown name.
    """
    if name == "auto":
        return next((parser for sign, parser in _SIGNS.items() if sign in chat_template), "json")
    if name not in PARSERS:
        raise UserError(f"rollout.tool_parser: unknown value '{name}'; {did_you_mean(name, ['auto', *PARSERS])}")
    return name


def _no_calls(text: str) -> Parsed:
    return Parsed(text, [])


_NO_CALLS = Parser(_no_calls)


def choose(name: str, chat_template: str, tools: bool = True) -> Parser:
    """Return the parser of a name, as `named` does; by `auto`, hermes and DeepSeek's also read JSON without tags.

    Without tools a reply that looks like a call is none; only channels are told apart then.
    """
    found = named(name, chat_template)
    if not tools and not PARSERS[found].channels:
        return _NO_CALLS
    return _OR_JSON.get(found, PARSERS[found]) if name == "auto" else PARSERS[found]
