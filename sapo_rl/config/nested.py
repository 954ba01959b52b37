"""Configs as nested mappings, the form in which they are read and written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def leaves(node: dict[Any, Any], prefix: str = "", *, empty: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every leaf; an empty mapping is one only where `empty`."""
    for name, value in node.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, dict) and (value or not empty):
            yield from leaves(value, key, empty=empty)
        else:
            yield key, value
