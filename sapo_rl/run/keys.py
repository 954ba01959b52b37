"""Every key of the config, with its type, default, range and meaning, out of the schema itself."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from sapo_rl import config
from sapo_rl.config.fields import BOUNDS, MISSING


@dataclass(frozen=True)
class Key:
    """What may be set."""

    name: str
    """Dotted; `NAME` stands for a name of the user's own."""
    type: str
    """As Python says it, but for `or null`."""
    default: str
    """As JSON; empty where the user must give a value."""
    valid: str
    """The choices or the range; empty where only the type counts."""
    meaning: str

    def __str__(self) -> str:
        """Two lines, of which the second is as long as the meaning."""
        default = f"default {self.default}" if self.default else "must be given"
        return f"{self.name}: {', '.join(filter(None, (self.type, self.valid)))}; {default}\n    {self.meaning}"


def every_key() -> list[Key]:
    """Return every key, in the order of the schema."""
    return list(_keys_of(config.Config, ""))


def matching(part: str) -> list[Key]:
    """Return the keys whose name begins with `part`, or else contains it; none where there is no such key."""
    everything = every_key()
    return [key for key in everything if key.name.startswith(part)] or [key for key in everything if part in key.name]


def listing(found: Sequence[Key], width: int) -> str:
    """Write keys for a terminal of `width` columns."""
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        for key in found
        for line in str(key).splitlines()
    )


def _keys_of(schema: type, prefix: str) -> Iterator[Key]:
    meanings = {name: text for base in schema.__mro__ for name, text in _meanings().get(base.__name__, {}).items()}
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name, kind = f"{prefix}{field.name}", str(field.type)
        if isinstance(field.default_factory, type) and dataclasses.is_dataclass(field.default_factory):
            yield from _keys_of(field.default_factory, f"{name}.")
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        kind = re.sub(r"^Optional\[(.*)\]$", r"\1 or null", kind)
        entries: list[Any] = [one for one in get_args(hints[field.name])[1:] if dataclasses.is_dataclass(one)]
        written = "" if default == MISSING else json.dumps(default)
        yield Key(name, "a mapping" if entries else kind, written, _valid(field.metadata), meanings[field.name])
        for entry in entries:
            yield from _keys_of(entry, f"{name}.NAME.")


def _valid(metadata: Any) -> str:
    if metadata.get("choices"):
        own = f", or the dotted path of your own {metadata['own']}" if metadata["own"] else ""
        return "one of " + ", ".join(metadata["choices"]) + own
    bounds = {words: metadata[name] for name, (words, _) in BOUNDS.items() if metadata.get(name) is not None}
    return ", ".join(
        f"{words} {bound:g}" if isinstance(bound, float) else f"{words} {bound}" for words, bound in bounds.items()
    )


@functools.cache
def _meanings() -> dict[str, dict[str, str]]:
    """The docstring under each field, by class and field."""
    found: dict[str, dict[str, str]] = {}
    files = sorted(Path(config.__file__).parent.glob("*.py"))
    for node in [node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body]:
        if isinstance(node, ast.ClassDef):
            pairs = zip(node.body, node.body[1:], strict=False)
            found[node.name] = {
                ast.unparse(one.target): " ".join(str(text.value.value).split())
                for one, text in pairs
                if isinstance(one, ast.AnnAssign)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            }
    return found
