"""How a reply ends, beside whether it is right."""

import re

LAST_LINE = re.compile(r"#### *-?[\d,]+(\.\d+)?")


def last_line(completions: list[str], **columns: list) -> list[float]:
    """1 where the last line is #### and a number."""
    return [float(bool(LAST_LINE.fullmatch((text.strip().splitlines() or [""])[-1]))) for text in completions]
