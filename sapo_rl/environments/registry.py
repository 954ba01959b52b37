"""The table of built-in environments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sapo_rl.plugins import Registry

ENVIRONMENTS: Registry[type[Any]] = Registry("environment")
"""Built-in environments by the name that `environment.name` takes."""

ROW_CHECKS: dict[str, Callable[[Mapping[str, Any]], None]] = {}
"""What raises ValueError for a row with which no episode of a built-in can begin, by its name; it has the columns that
`reset` needs."""
