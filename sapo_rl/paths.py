"""Where the files lie that come with the package."""

from __future__ import annotations

from pathlib import Path

PACKAGED = Path(__file__).parent / "configs"

CONFIGS = PACKAGED if PACKAGED.is_dir() else Path(__file__).parents[1] / "configs"
"""The shipped configs: inside the wheel, or beside the package in a checkout."""
