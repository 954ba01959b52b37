"""A tool of the agent. The model knows it by its name, its types and its docstring."""

import datetime


def days_between(first: str, second: str) -> int:
    """Count the days from one date to another.

    Args:
        first: The earlier date, such as 2024-02-28.
        second: The later date.
    """
    return (datetime.date.fromisoformat(second) - datetime.date.fromisoformat(first)).days
