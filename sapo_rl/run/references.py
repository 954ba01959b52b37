"""A composed config as plain values, in which what comes from the environment stays a reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from omegaconf import BooleanNode, DictConfig, FloatNode, IntegerNode, ListConfig, OmegaConf
from omegaconf.resolvers import oc


def resolve(config: DictConfig) -> dict[str, Any]:
    """Return `config` as dictionaries and lists, interpolations resolved unless they read environment variables.

    Those stay as they are written, `${oc.env:NAME}`, whatever their key, also where they are a part of a text or are
    reached through another key: they may be secrets. Numbers and booleans that the schema asks for are resolved.

    Raises:
        OmegaConfBaseException: an interpolation that cannot be resolved, or a value that is missing.
    """
    with _noticed() as reads:
        return _resolve(config, reads)


@contextlib.contextmanager
def _noticed() -> Iterator[list[str]]:
    """Give a list that takes the name of every environment variable as an interpolation reads it."""
    reads: list[str] = []

    def env(*arguments: Any) -> Any:
        reads.append(arguments[0])
        return oc.env(*arguments)

    OmegaConf.register_new_resolver("oc.env", env, replace=True)
    try:
        yield reads
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _resolve(node: Any, reads: list[str]) -> Any:
    if isinstance(node, DictConfig):
        return {key: _item(node, key, reads) for key in node}
    if isinstance(node, ListConfig):
        return [_item(node, index, reads) for index in range(len(node))]
    return node


def _item(node: Any, key: Any, reads: list[str]) -> Any:
    reads.clear()
    value = node[key]
    if not OmegaConf.is_interpolation(node, key):
        return _resolve(value, reads)
    leaf = node._get_node(key)
    secret = reads and not isinstance(leaf, IntegerNode | FloatNode | BooleanNode)
    if secret or (isinstance(value, str) and "${" in value):  # the latter is written `\${`, and will be read once more
        return leaf._value()
    return _resolve(value, reads)
