"""Files that a user names: looked for, read and parsed; a mistake is told with the file's name and, if known, line."""

from __future__ import annotations

import io
import json
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sapo_rl.errors import UserError, described, first_line

DEEPEST = 50
"""Levels of nesting in a user's file; libraries that walk deeper trees exhaust Python's stack."""
MOST_VALUES = 100_000
"""Values in a YAML file once its aliases are written out; few lines of aliases of aliases stand for billions."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Note `what`, a file or key, on an exception raised inside: a last guard tells where it came about."""
    try:
        yield
    except Exception as error:
        if not getattr(error, "__notes__", None):  # a note from further inside is nearer to the cause
            error.add_note(what)
        raise


def expand(path: str | Path) -> Path:
    """Return `path` with `~` replaced; as it is where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_file(path: str | Path) -> bool:
    """Whether `path` is a regular file; False too for what cannot be a path: too long, a NUL in it, a loop of links.

    Raises:
        UserError: a folder on the way may not be searched.
    """
    return _is(path, stat.S_ISREG)


def is_folder(path: str | Path) -> bool:
    """Whether `path` is a folder; otherwise as `is_file`."""
    return _is(path, stat.S_ISDIR)


def _is(path: str | Path, kind: Any) -> bool:
    try:
        return kind(expand(path).stat().st_mode)
    except PermissionError as error:
        raise UserError(f"'{path}' cannot be looked at: {error.strerror}") from error
    except (OSError, ValueError):
        return False


def text_in(path: str | Path) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return expand(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}") from error


def parse_json(text: str, where: str) -> Any:
    """Return what the JSON `text` holds; `where` names it in messages.

    Raises:
        UserError: no JSON, nested deeper than `DEEPEST`, or a whole number longer than Python reads.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: no valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise UserError(f"{where}: is nested deeper than {DEEPEST} levels") from error
    except ValueError as error:
        raise UserError(f"{where}: a whole number of more than 4,300 digits; write it as text") from error
    if text.count("[") + text.count("{") > DEEPEST and deeper(value, DEEPEST):
        raise UserError(f"{where}: is nested deeper than {DEEPEST} levels")
    return value


def deeper(value: Any, levels: int) -> bool:
    """Whether lists and dictionaries in `value` are nested deeper than `levels`."""
    layer = [value]
    for _ in range(levels):
        layer = [item for one in layer for item in _items(one) if isinstance(item, dict | list)]
        if not layer:
            return False
    return True


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_json(path: str | Path) -> Any:
    """Return what a JSON file holds; raises UserError as `text_in` and `parse_json` do."""
    return parse_json(text_in(path), f"'{path}'")


def read_yaml(path: str | Path, load: Callable[[io.StringIO], Any] = yaml.safe_load) -> Any:
    """Return what a YAML file holds, as `load` makes it of the text; with `yaml.safe_load`, None where it is empty.

    Raises:
        UserError: it cannot be read, is no YAML, or its tags, aliases or nesting are none that a config has.
    """
    text = text_in(path)
    try:
        _check_yaml(text, path)
        return load(io.StringIO(text))
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_line(error)}: no valid YAML: {_problem(error)}") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:  # such as from !!int abc
        raise UserError(f"{path}: has a key or value that no config can hold: {described(error)}") from error


def _check_yaml(text: str, path: str | Path) -> None:
    """Refuse YAML that libraries cannot walk in bounded time and stack; `path` names it in messages.

    Raises:
        UserError: nested deeper than `DEEPEST`, an anchor that contains itself, or aliases that stand for too much.
        yaml.YAMLError: no YAML.
    """
    depth = 0
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(io.StringIO(text), Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                raise UserError(f"{path}:{event.start_mark.line + 1}: is nested deeper than {DEEPEST} levels")
            open_nodes.append((event.anchor, total))
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                line = event.start_mark.line + 1
                raise UserError(f"{path}:{line}: '*{event.anchor}' stands inside what it refers to")
            total += sizes.get(event.anchor, 1)
        total += 1
        if total > MOST_VALUES:
            raise UserError(f"{path}: holds more than {MOST_VALUES:,} values, its aliases written out")


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark is not None else ""


def _problem(error: yaml.YAMLError) -> str:
    return first_line(getattr(error, "problem", None) or getattr(error, "reason", None) or error)


def touch_log(log: Path | None, whose: str) -> None:
    """Make the log and its folder.

    Raises:
        UserError: it cannot be written; `whose` says who prints there.
    """
    if log is not None:
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.touch()
        except OSError as error:
            raise UserError(f"what {whose} print cannot be written: {error}") from error
