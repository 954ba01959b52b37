"""Groups of made-up completions, and what they were scored."""

from __future__ import annotations

from typing import Any

from samples import one_row

from sapo_rl.types import Group, Prompt


def group(index: int, texts: list[str], **columns: Any) -> Group:
    return Group(Prompt(index, [1], "Q?", columns), [one_row([0], text=text) for text in texts])


def rewards(groups: list[Group], name: str) -> list[list[float | None]]:
    return [[sample.rewards[name] for sample in group.samples] for group in groups]
