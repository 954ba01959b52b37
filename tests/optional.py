"""Tests of packages that may be missing, which take seconds to import: no worker does that to collect tests."""

from __future__ import annotations

import importlib.util

import pytest


def needs(package: str) -> pytest.MarkDecorator:
    """Skip where a package is not installed, without importing it."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs the package {package}")
