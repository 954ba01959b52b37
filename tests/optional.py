"""Tests of what may be missing: packages, which take seconds to import so that no worker does, and a browser."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""The program; None where there is none."""


def needs(package: str) -> pytest.MarkDecorator:
    """Skip where a package is not installed, without importing it."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs the package {package}")
