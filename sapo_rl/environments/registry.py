"""The table of built-in environments."""

from __future__ import annotations

from typing import Any

from sapo_rl.plugins import Registry

ENVIRONMENTS: Registry[type[Any]] = Registry("environment")
"""Built-in environments by the name that `environment.name` takes."""
