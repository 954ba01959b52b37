"""Questions that a small model cannot answer in its head."""

import datetime
import random


def spans(count: int = 4096, seed: int = 0) -> list[dict[str, str]]:
    """Pairs of dates up to two years apart, with the days between them."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        first, days = datetime.date(2000, 1, 1) + datetime.timedelta(rng.randrange(9000)), rng.randint(1, 730)
        second = first + datetime.timedelta(days)
        rows.append({"prompt": f"How many days are there from {first} to {second}?", "answer": str(days)})
    return rows
