"""What all end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator

import forked
import pytest

from sapo_rl.engines import child_process


@pytest.fixture(scope="module", autouse=True)
def forked_engines() -> Iterator[None]:
    """Engines that a test starts by itself are forked; those of runs through `command` are started as a user's are."""
    own = child_process.subprocess
    forked.take_engines()
    yield
    child_process.subprocess = own
