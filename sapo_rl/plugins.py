"""Names to objects: registries of built-ins, and what users name by dotted path, `package.module.name`."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from sapo_rl.errors import UserError, did_you_mean


def find(kind: str, path: str) -> Any:
    """Import and return what the dotted `path` names; the current directory is importable.

    `kind` is the word used in messages.

    Raises:
        UserError: no such module or attribute, or a module that fails to import.
    """
    module_name, attribute = _split(kind, path)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(_no_module(kind, path, module_name)) from error
        raise UserError(_import_failed(kind, path, module_name, error)) from error
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise UserError(_import_failed(kind, path, module_name, error)) from error
    if not hasattr(module, attribute):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module_name]
        raise UserError(_no_attribute(kind, path, module_name, attribute, own))
    return getattr(module, attribute)


def check(kind: str, path: str) -> None:
    """Refuse early most of what `find` would refuse, without importing the user's module.

    Raises:
        UserError: a missing module, a file that does not parse or never mentions the name.
    """
    module_name, attribute = _split(kind, path)
    spec = find_spec(module_name)
    if spec is None:
        raise UserError(_no_module(kind, path, module_name))
    if spec.origin is None or not spec.origin.endswith(".py"):
        return
    try:
        source = Path(spec.origin).read_bytes()
        tree = ast.parse(source)
    except OSError as error:
        raise UserError(f"'{spec.origin}' cannot be read: {error.strerror}") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        cause = getattr(error, "msg", error) or "nested too deeply"
        raise UserError(f"{spec.origin}:{line}: syntax error: {cause}") from error
    text = source.decode(errors="replace")
    if not re.search(rf"\b{re.escape(attribute)}\b", text) and "import *" not in text:
        known = [x.name for x in tree.body if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
        raise UserError(_no_attribute(kind, path, spec.origin, attribute, known))


def check_arguments(
    where: str, target: Callable[..., Any], args: Mapping[str, Any], settings: Sequence[inspect.Parameter]
) -> None:
    """Refuse arguments that a function or class would refuse, or whose type its annotations exclude.

    Args:
        where: dotted key of `args`, for messages.
        target: a function, or a class whose constructor is meant.
        args: by name.
        settings: the parameters of `target` that `args` may set.

    Raises:
        UserError: an unknown name, a value of another type, or a parameter without a default that is missing.
    """
    hints, known = _hints_of(target), {setting.name: setting for setting in settings}
    takes_all = any(setting.kind is inspect.Parameter.VAR_KEYWORD for setting in settings)
    named = {key: setting for key, setting in known.items() if setting.kind in NAMED}
    for key, value in args.items():
        if key not in named and not takes_all:
            raise UserError(f"{where}.{key}: unknown argument; {did_you_mean(key, named) or 'it takes none'}")
        if key in named and not _fits(value, hints.get(key, Any)):
            hint = re.sub(r"<class '(\w+)'>", r"\1", str(hints[key]))
            raise UserError(f"{where}.{key}: {value!r} is a {type(value).__name__}, must be {hint}")
    missing = [key for key, one in named.items() if one.default is inspect.Parameter.empty and key not in args]
    if missing:
        raise UserError(f"{where}: '{missing[0]}' is missing")


NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
"""Kinds of parameters that can be passed by name."""


def parameters_of(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function or class by name; `*args, **kwargs` where it is written in C and has none."""
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return inspect.signature(lambda *args, **kwargs: None).parameters


def accepted(target: Callable[..., Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """Return those of `keywords` that a function names; all of them where it takes `**kwargs`."""
    parameters = parameters_of(target)
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return keywords
    return {name: value for name, value in keywords.items() if name in parameters}


def _hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of the parameters, as objects; none where a name in them means nothing at run time."""
    own = isinstance(target, type) and not hasattr(target, "__dataclass_fields__")
    try:
        return get_type_hints(target.__init__ if own else target)
    except (NameError, TypeError, AttributeError):
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of YAML has the annotated type; kinds of annotations that YAML knows nothing of admit all."""
    kind, options = get_origin(hint), get_args(hint)
    if kind is list:
        return isinstance(value, list) and all(_fits(item, options[0]) for item in cast(list[Any], value))
    if kind is Union or kind is types.UnionType:
        return any(_fits(value, option) for option in options)
    if kind is Literal:
        return value in options
    if hint not in (bool, int, float, str, list, dict, type(None)):
        return True
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def import_from_here() -> None:
    """Make the modules of the current directory importable."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def find_spec(module: str) -> ModuleSpec | None:
    """Like `importlib.util.find_spec`, which would import the parent packages."""
    path, spec, parts = None, None, module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        spec = next((s for finder in sys.meta_path if (s := finder.find_spec(name, path)) is not None), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
        if path is None and depth < len(parts):
            return None
    return spec


def _split(kind: str, path: str) -> tuple[str, str]:
    """The module and the name in it; from here on the current directory is importable."""
    if not all(path.split(".")):
        raise UserError(f"{kind} '{path}' is no dotted path; valid: package.module.name")
    import_from_here()
    module, _, attribute = path.rpartition(".")
    return module, attribute


def _no_module(kind: str, path: str, module: str) -> str:
    return f"{kind} '{path}': there is no module '{module}' (searched in {os.getcwd()} and sys.path)"


def _no_attribute(kind: str, path: str, module: str, attribute: str, known: list[str]) -> str:
    hint = did_you_mean(attribute, [name for name in known if not name.startswith("_")])
    return f"{kind} '{path}': '{module}' has no '{attribute}'{'; ' if hint else ''}{hint}"


def _import_failed(kind: str, path: str, module: str, error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = error.lineno if isinstance(error, SyntaxError) else last.lineno
    file = error.filename if isinstance(error, SyntaxError) else last.filename
    cause = f"{type(error).__name__}: {error} ({file}:{line})"
    return f"{kind} '{path}': importing '{module}' failed: {cause}"


T = TypeVar("T")

Entry = TypeVar("Entry")


class UnknownNameError(UserError, KeyError):
    """A name that the registry does not hold; the message lists those it does."""

    __str__ = Exception.__str__  # KeyError's would show the message in quotes


class Registry(Generic[T]):
    """Maps names to registered objects of one kind (`kind` is the word used in messages)."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register_module(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that enters its object under `name`.

        Raises:
            ValueError: another object holds that name already.
        """

        def enter(entry: Entry) -> Entry:
            if self._entries.setdefault(name, cast(T, entry)) is not entry:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            return entry

        return enter

    def get(self, name: str) -> T:
        """Return the object registered under `name`.

        Raises:
            UnknownNameError: with the nearest name and the list of all.
        """
        if name in self._entries:
            return self._entries[name]
        raise UnknownNameError(f"unknown {self.kind} '{name}'; {did_you_mean(name, self._entries)}")

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
