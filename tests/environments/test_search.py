"""Documents that are searched and read."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_rl.environments.search import BM25, Search

DOCUMENTS = [
    {"title": "Ed Wood", "sentences": ["Ed Wood was an American filmmaker.", " He was born in 1924."]},
    {"title": "Ed Wood (film)", "text": "Ed Wood is a 1994 film about the filmmaker, directed by Tim Burton."},
    {"title": "Woodson, Arkansas", "text": "Woodson is a place in Arkansas."},
]


def shelf(results: int = 2) -> Search:
    made = Search(results)
    made.reset(DOCUMENTS)
    return made


def test_scores_are_bm25s() -> None:
    # fox is in one of two documents of 3 and 1 words, 2 on average: idf ln(1 + 1.5 / 1.5), tf with k1 = 1.5, b = 0.75
    expected = math.log(2) * 2 * 2.5 / (2 + 1.5 * (0.25 + 0.75 * 3 / 2))
    assert BM25(["fox, Fox dog", "cat"]).scores("FOX bird") == pytest.approx([expected, 0.0])
    both = BM25(["dog cat", "dog fox"]).scores("dog")  # a word that all have counts little: ln(1 + 0.5 / 2.5)
    assert both == pytest.approx([math.log(1.2)] * 2)


@given(st.lists(st.text("ab ", max_size=8), max_size=5), st.text("abc ", max_size=8))
def test_what_shares_no_word_scores_nothing_and_anything_else_something(documents: list[str], query: str) -> None:
    scores = BM25(documents).scores(query)
    shares = [bool({*document.split()} & {*query.split()}) for document in documents]
    assert [score > 0 for score in scores] == shares


def test_a_search_shows_the_best_documents_and_how_they_begin() -> None:
    assert shelf().search("Who directed the film Ed Wood?").split("\n") == [
        "Ed Wood (film): Ed Wood is a 1994 film about the filmmaker, directed by Tim Burton.",
        "Ed Wood: Ed Wood was an American filmmaker. He was born in 1924.",
    ]
    assert shelf().search("Arkansas") == "Woodson, Arkansas: Woodson is a place in Arkansas."
    assert shelf().search("quantum") == "No document has any of these words."
    long = Search()
    long.reset([{"title": "Long", "text": "word " * 100}])
    assert len(long.search("word")) == len("Long: ") + 300


def test_a_document_is_read_by_its_title() -> None:
    assert shelf().read(" ed wood ") == "Ed Wood was an American filmmaker. He was born in 1924."
    assert shelf().read("Ed Wod").startswith("There is no document 'Ed Wod'; did you mean 'Ed Wood'?")


def test_passages_of_one_title_are_one_document_and_sentences_are_apart() -> None:
    made = Search()
    made.reset(
        [
            {"title": "Fox", "sentences": ["The fox is red.", "It hunts."]},
            {"title": "Fox", "text": "It sleeps in a den."},
        ]
    )
    whole = "The fox is red. It hunts.\nIt sleeps in a den."
    assert made.read("fox") == whole and made.search("red") == made.search("den") == f"Fox: {whole}"


def test_with_the_last_call_an_answer_is_asked_for_and_no_more_is_told() -> None:
    made = Search(calls=2)
    made.reset(DOCUMENTS)
    assert made.search("Arkansas").count("\n") == 0
    assert made.read("no such title").endswith("\nThat was the last call. Reply with the answer now.")
    assert made.read("Ed Wood") == made.search("Arkansas") == "That was the last call. Reply with the answer now."
    made.reset(DOCUMENTS)
    assert made.read("Ed Wood").startswith("Ed Wood was")


@pytest.mark.parametrize(
    "wrong", [{"title": "A"}, {"text": "a"}, {"title": 1, "text": "a"}, "A", {"title": "A", "sentences": [1]}]
)
def test_a_document_without_title_or_text_is_told(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"^documents\[1\] must have a title, and a text or sentences"):
        Search().reset([DOCUMENTS[0], wrong])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="results is 0 and calls is 4, must be at least 1"):
        Search(0)
