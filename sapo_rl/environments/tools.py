"""Typed Python functions as tools: their schemas for the chat template, and a call of one, JSON in and text out.

Whatever is wrong with a call is text for the model: it never ends an episode.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

from sapo_rl.errors import UserError, did_you_mean
from sapo_rl.errors.own_code import is_dict, is_list

NO_TOOLS = frozenset({"reset", "step", "get_reward", "close"})
"""Methods of an environment that are not the model's to call."""


class Tool(NamedTuple):
    """A function that the model may call."""

    name: str
    function: Callable[..., Any]
    schema: dict[str, Any]
    """As chat templates and OpenAI's API read it."""


class Outcome(NamedTuple):
    """What a call has brought."""

    text: str
    """The result, or what is wrong, for the model."""
    failed: bool


class WrongArgument(Exception):
    """An argument that is not as the schema says; the text is for the model."""


def tools_of(functions: Iterable[Callable[..., Any]]) -> dict[str, Tool]:
    """Return tools by name, made of functions or bound methods with types and a docstring in Google's style.

    Raises:
        UserError: naming a function without a type or a description for an argument, or with `*` arguments; or two of
            one name.

    Example:
        >>> def add(a: int, b: int) -> int:
        ...     '''Add two numbers.
        ...
        ...     Args:
        ...         a: The first.
        ...         b: The second.
        ...     '''
        ...     return a + b
        >>> tools = tools_of([add])
        >>> await call(tools, "add", {"a": 1, "b": 2})
        Outcome(text='3', failed=False)
        >>> await call(tools, "add", {"a": 1})
        Outcome(text="error: add: argument 'b' is missing", failed=True)
    """
    tools: dict[str, Tool] = {}
    for function in functions:
        tool = Tool(_name(function), function, _schema(function))
        if tool.name in tools:
            raise UserError(f"tools: two are called '{tool.name}'; names must differ")
        tools[tool.name] = tool
    return tools


def tools_of_object(environment: object) -> dict[str, Tool]:
    """Return the tools of an environment: its public methods but `reset`, `step`, `get_reward` and `close`.

    Raises:
        UserError: naming a method that is no tool as it stands.
    """
    names = [name for name in dir(type(environment)) if not name.startswith("_") and name not in NO_TOOLS]
    methods = [name for name in names if inspect.isroutine(inspect.getattr_static(environment, name))]
    return tools_of(getattr(environment, name) for name in methods)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _schema(function: Callable[..., Any]) -> dict[str, Any]:
    from transformers.utils import chat_template_utils

    described = cast(Any, chat_template_utils)
    asked = described.is_torch_available
    where = getattr(function, "__qualname__", _name(function))
    described.is_torch_available = lambda: False  # or every worker imports it: no argument in JSON is a tensor
    try:
        parameters = inspect.signature(function).parameters.values()
        if any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD, one.POSITIONAL_ONLY) for one in parameters):
            raise UserError(f"tools: {where}: its arguments must have names; *, ** and / cannot be in a tool")
        return described.get_json_schema(function)
    except UserError:
        raise
    except Exception as error:  # what it is that has no types or no docstring is in the text
        raise UserError(
            f"tools: {where}: {error}; a tool has a type for each argument and a docstring in Google's style "
            "that describes them; a method that is no tool begins with _"
        ) from error
    finally:
        described.is_torch_available = asked


async def call(tools: dict[str, Tool], name: str, arguments: dict[str, Any]) -> Outcome:
    """Call a tool, awaiting it where it is a coroutine function; its result is text as it is, anything else JSON.

    Nothing is raised: an unknown tool, an argument that is missing, unknown or of a wrong type, what the tool raises,
    and a result that is no JSON are told to the model.
    """
    if name not in tools:
        return Outcome(f"error: there is no tool '{name}'; {did_you_mean(name, tools)}", True)
    tool = tools[name]
    try:
        given = checked(tool, arguments)
    except WrongArgument as error:
        return Outcome(f"error: {name}: {error}", True)
    try:
        result = tool.function(**given)
        if inspect.isawaitable(result):
            result = await result
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        return Outcome(text.encode(errors="replace").decode(), False)  # half of a character is no text
    except Exception as error:  # it is the user's code, called as a model likes
        return Outcome(f"error: {name}: {type(error).__name__}: {error}", True)


def checked(tool: Tool, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments as the function takes them: `2.0` for an integer is `2`.

    Raises:
        WrongArgument: one that is missing, unknown or of a wrong type.
    """
    schema = tool.schema["function"]["parameters"]
    properties = schema.get("properties", {})
    for name in arguments:
        if name not in properties:
            raise WrongArgument(f"unknown argument '{name}'; its arguments are: {', '.join(properties) or 'none'}")
    for name in schema.get("required", []):
        if name not in arguments:
            raise WrongArgument(f"argument '{name}' is missing")
    return {name: _fitted(value, properties[name], name) for name, value in arguments.items()}


def _fitted(value: Any, schema: dict[str, Any], what: str) -> Any:
    """The value as a schema of `get_json_schema` wants it."""
    if value is None and schema.get("nullable"):
        return None
    if "anyOf" in schema:
        return _any_of(value, schema["anyOf"], what)
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(_is(value, one) for one in types):
        raise WrongArgument(
            f"argument '{what}' must be of type {' or '.join(types)}, not {json.dumps(value, ensure_ascii=False)}"
        )
    if "enum" in schema and value not in schema["enum"]:
        raise WrongArgument(f"argument '{what}' must be one of {json.dumps(schema['enum'], ensure_ascii=False)}")
    if is_list(value) and "items" in schema:
        return [_fitted(one, schema["items"], f"{what}[{place}]") for place, one in enumerate(value)]
    if is_dict(value) and isinstance(schema.get("additionalProperties"), dict):
        return {key: _fitted(one, schema["additionalProperties"], f"{what}.{key}") for key, one in value.items()}
    return int(value) if isinstance(value, float) and "integer" in types and "number" not in types else value


def _any_of(value: Any, schemas: list[dict[str, Any]], what: str) -> Any:
    problem = WrongArgument(f"argument '{what}' is of no type that it may have")
    for schema in schemas:
        try:
            return _fitted(value, schema, what)
        except WrongArgument as error:
            problem = error
    raise problem


def _is(value: Any, kind: str) -> bool:
    """Whether a value of JSON is of one of JSON schema's types."""
    if kind == "integer":
        return not isinstance(value, bool) and (
            isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        )
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    kinds = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}
    return kind == "any" or isinstance(value, kinds.get(kind, ()))
