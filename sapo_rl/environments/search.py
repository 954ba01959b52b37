"""Questions about documents that come with the row: the model searches them and reads what it needs."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sapo_rl.environments.registry import ENVIRONMENTS, ROW_CHECKS
from sapo_rl.errors import did_you_mean
from sapo_rl.errors.own_code import is_list

SHOWN = 300
"""Characters of a document that a search shows."""
K1, B = 1.5, 0.75
"""BM25's usual settings: how soon a repeated word counts no more, and how much long documents are held back."""
LAST = "That was the last call. Reply with the answer now."
_WORD = re.compile(r"\w+")


@ENVIRONMENTS.register_module("search")
class Search:
    """Lets the model search and read the documents of its row; rewards are left to the reward functions.

    Args:
        results: how many documents a search shows.
        calls: how many calls the model has; with the last it is asked to answer. Leave `environment.max_turns` a turn
            more, else the episode ends without an answer.
    """

    def __init__(self, results: int = 3, calls: int = 4) -> None:
        if results < 1 or calls < 1:
            raise ValueError(f"results is {results} and calls is {calls}, must be at least 1")
        self.results, self.calls = results, calls

    def reset(self, documents: list[dict[str, Any]]) -> None:
        """Take the row's documents, each with a `title`, and its `text` or `sentences`; those of one title are one."""
        self._left = self.calls
        self._texts: dict[str, str] = {}
        for title, text in itertools.starmap(_document, enumerate(documents)):
            known = self._texts.get(title)
            self._texts[title] = text if known is None else f"{known}\n{text}"
        self._titles = {title.casefold(): title for title in self._texts}
        self._index = BM25([f"{title} {text}" for title, text in self._texts.items()])

    def search(self, query: str) -> str:
        """Find documents that suit a query. Shows their titles and how they begin.

        Args:
            query: Words to look for, e.g. "director of Doctor Strange".

        Returns:
            A line for each document, the best first.
        """
        scores, documents = self._index.scores(query), list(self._texts.items())
        best = sorted(range(len(scores)), key=lambda place: -scores[place])[: self.results]
        found = [documents[place] for place in best if scores[place] > 0]
        shown = "\n".join(f"{title}: {text[:SHOWN]}" for title, text in found)
        return self._told(shown or "No document has any of these words.")

    def read(self, title: str) -> str:
        """Read a document.

        Args:
            title: Its title, as a search shows it.

        Returns:
            Its text.
        """
        if (known := self._titles.get(title.strip().casefold())) is None:
            return self._told(f"There is no document '{title[:SHOWN]}'; {did_you_mean(title, self._texts)}")
        return self._told(self._texts[known])

    def _told(self, text: str) -> str:
        """What the model is told: nothing but to answer once it has no calls left."""
        self._left -= 1
        return text if self._left > 0 else f"{text}\n{LAST}" if self._left == 0 else LAST


class BM25:
    """Scores documents by the words that they share with a query (Robertson and Zaragoza 2009, Lucene's weights).

    Made for the few documents of a row; a library with an index of its own pays from thousands on.

    Example:
        >>> [round(score, 3) for score in BM25(["a red fox", "a dog"]).scores("red dog")]
        [0.636, 0.762]
    """

    def __init__(self, documents: Sequence[str]) -> None:
        self._counts = [Counter(_words(document)) for document in documents]
        self._lengths = [counts.total() for counts in self._counts]
        self._mean_length = sum(self._lengths) / max(1, len(documents))
        self._found_in = Counter(word for counts in self._counts for word in counts)

    def scores(self, query: str) -> list[float]:
        """Return the score of each document, 0 where it shares no word with the query."""
        weights = {word: self._weight(word) for word in _words(query) if word in self._found_in}
        return [
            sum(weight * self._share(counts[word], length) for word, weight in weights.items())
            for counts, length in zip(self._counts, self._lengths, strict=True)
        ]

    def _weight(self, word: str) -> float:
        found_in = self._found_in[word]
        return math.log(1 + (len(self._counts) - found_in + 0.5) / (found_in + 0.5))

    def _share(self, count: int, length: int) -> float:
        return count * (K1 + 1) / (count + K1 * (1 - B + B * length / self._mean_length))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _document(place: int, given: dict[str, Any]) -> tuple[str, str]:
    """Its title and text; raises ValueError where it has none."""
    try:
        text = given["text"] if "text" in given else " ".join(one.strip() for one in given["sentences"])
        if not isinstance(given["title"], str) or not isinstance(text, str):
            raise TypeError
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"documents[{place}] must have a title, and a text or sentences, as text") from None
    return given["title"], text.strip()


def _check_row(row: Mapping[str, Any]) -> None:
    """Raise ValueError where its documents are none."""
    documents = row["documents"]
    if not is_list(documents):
        kind = type(documents).__name__
        raise ValueError(f"documents is a {kind}, must be a list of {{title, text}} or {{title, sentences}}")
    for place, given in enumerate(documents):
        _document(place, given)


ROW_CHECKS["search"] = _check_row
