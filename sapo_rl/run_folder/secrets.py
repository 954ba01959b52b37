"""Which settings are secrets, and how they are kept out of what is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

REDACTED = "<redacted>"

SECRET = re.compile(
    r"(^|_)(secrets?|passw(or)?ds?|passphrase|pwd|authorization|credentials?|apikeys?|"
    r"(api|access|secret|private)_keys?|(api|access|auth|bearer|hf|wandb)_tokens?)$|^token$"
)


def is_secret(key: str) -> bool:
    """Whether a config key's last part names a secret: `judge.api_key` and `hfToken` do, `sort_key` does not."""
    last = re.sub(r"([a-z])([A-Z])", r"\1_\2", key.rpartition(".")[2])
    return SECRET.search(last.lower().replace("-", "_")) is not None


def redact_override(argument: str) -> str:
    """Return one `key=value` argument with secrets replaced, those inside `{key: value}` included."""
    name, equals, value = argument.partition("=")
    if equals and is_secret(name):
        return f"{name}={REDACTED}" if worth_hiding(value) else argument
    pair = r"""(?P<key>[\w.-]+)(?P<sep>["']?\s*:\s*)(?P<value>"[^"]*"|'[^']*'|(?:\$\{[^}]*\}|[^,{}\[\]])+)"""

    def hide(found: re.Match[str]) -> str:
        secret = is_secret(found["key"]) and worth_hiding(found["value"])
        return found["key"] + found["sep"] + REDACTED if secret else found[0]

    return name + equals + re.sub(pair, hide, value) if "{" in value else argument


def redact_yaml(text: str) -> str:
    """Return YAML text with the values under secret-looking keys replaced, everything else as it was.

    References such as `${oc.env:NAME}` name a secret without holding it, and stay.
    """
    spans = set(_secret_spans(yaml.compose(text), ""))
    for start, end in sorted(spans, reverse=True):
        value = text[start:end].rstrip()  # a block's span reaches to the next key
        properties = re.match(r"(?:[&!]\S+\s+)*", value)  # an anchor is still referred to
        text = text[:start] + (properties[0] if properties else "") + REDACTED + text[start + len(value) :]
    return text


def _secret_spans(node: yaml.Node | None, key: str) -> Iterator[tuple[int, int]]:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _secret_spans(value, str(name.value))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _secret_spans(item, key)
    elif isinstance(node, yaml.ScalarNode) and is_secret(key) and worth_hiding(node.value):
        yield node.start_mark.index, node.end_mark.index


def worth_hiding(value: Any) -> bool:
    """Whether a value under a secret's key may be the secret itself: it is no blank, switch, or `${oc.env:NAME}`."""
    text = str(value).strip("'\" ")
    return value is not None and text.lower() not in ("", "null", "~", "true", "false") and "${" not in text
