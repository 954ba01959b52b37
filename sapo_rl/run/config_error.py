"""What a config that cannot be is refused with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from sapo_rl.errors import UserError, brief


class ConfigError(UserError):
    """A value that cannot be; `key` is its dotted name, so that the command line can say where it was set."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.problem = brief(problem)


@contextmanager
def under(key: str) -> Iterator[None]:
    """Name the key in what is raised inside, unless it names one of its own."""
    try:
        yield
    except UserError as error:
        found = re.match(r"((?:data|reward|launch|environments?|eval)\.[\w./-]+): (.*)", str(error), re.DOTALL)
        raise (ConfigError(found[1], found[2]) if found else ConfigError(key, str(error))) from error
