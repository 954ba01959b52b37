"""Configs as nested mappings, the form in which they are read and written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Puts quotes around texts that OmegaConf would read as numbers and PyYAML would not, such as 7e12.

    Unicode's next line is escaped: PyYAML writes it as it is, and reads it as a blank.
    """

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, '"' if "\x85" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+.\d_:]+[eE][-+]?\d+$"), list("-+.0123456789"))


def dumps(content: Any) -> str:
    """Return YAML that OmegaConf reads back as it is, keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def leaves(node: dict[Any, Any], prefix: str = "", *, empty: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every leaf; an empty mapping is one only where `empty`."""
    for name, value in node.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, dict) and (value or not empty):
            yield from leaves(value, key, empty=empty)
        else:
            yield key, value
