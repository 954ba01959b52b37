"""Environments of other projects, each behind an extra of its own that brings the project's package."""

from __future__ import annotations

import importlib
from types import ModuleType

from sapo_rl.errors import UserError


def package(name: str, environment: str) -> ModuleType:
    """Return an imported package. Raises UserError with the line that installs it where it is not there."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"environment '{environment}' needs {error.name}: pip install 'sapo-train[{environment}]'"
        ) from error
