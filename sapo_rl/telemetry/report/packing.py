"""How data lies in the page: JSON, compressed, in an alphabet that HTML does not read anything into."""

from __future__ import annotations

import base64
import gzip
import json
import math
from typing import Any

LEVEL = 6
"""Of compression; 9 takes three times as long for 2% less."""


def packed(value: Any) -> str:
    """Return JSON of `value`, compressed, as base64: the page unpacks it when it is looked at."""
    return base64.b64encode(gzip.compress(plain(value).encode(), LEVEL, mtime=0)).decode()


def rounded(value: Any, digits: int = 6) -> Any:
    """Return a float with so many digits, null where it is not finite; anything else as it is."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def plain(value: Any) -> str:
    """Return JSON of `value` that HTML may hold: neither a tag nor a comment is in it.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(value, separators=(",", ":"), allow_nan=False, default=str).replace("<", "\\u003c")
