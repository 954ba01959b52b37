"""Wordle: a hidden word is guessed, and each guess is answered by which letters are right."""

from __future__ import annotations

import random
import re
from functools import cache
from typing import Any

from sapo_rl.environments.registry import ENVIRONMENTS
from sapo_rl.errors import UserError
from sapo_rl.errors.files import text_in

ASKED = (
    "Guess my word of {length} letters in {guesses} guesses. After each I say of every letter: G, it is right; Y, it "
    "is in the word at another place; -, it is not in the word. Answer with one word, nothing else."
)
_WORD = re.compile(r"[a-z]+")


@ENVIRONMENTS.register_module("wordle")
class Wordle:
    """A word is to be guessed; the last word of its length in a reply is the guess.

    An episode that finds it earns 1 in all. Before that a guess that has more letters right, each at its place, than
    all before it earns a share of `shaping`; all of them together at most `shaping`.

    Args:
        words: file with the words that may be guessed, one a line, all of one length.
        guesses: how many the model has.
        shaping: from 0 to below 1.
    """

    def __init__(self, words: str, guesses: int = 6, shaping: float = 0.0) -> None:
        if guesses < 1:
            raise ValueError(f"guesses is {guesses}, must be at least 1")
        if not 0 <= shaping < 1:
            raise ValueError(f"shaping is {shaping}; must be from 0 to below 1")
        self.words, self.guesses, self.shaping = read_words(words), guesses, shaping

    def reset(self, seed: int, answer: str | None = None) -> None:
        """Take the row's `answer` for the word where it is one, in capitals or not, else draw it."""
        known = (answer or "").lower()
        self.word = known if known in self.words else random.Random(seed).choice(sorted(self.words))
        self.left, self.most, self.earned = self.guesses, 0, 0.0

    def step(self, reply: str) -> tuple[str | None, float, bool]:
        """Compare the guess; one that is no word of the list costs a guess and tells nothing."""
        found = [word for word in _WORD.findall(reply.lower()) if len(word) == len(self.word)]
        self.left -= 1
        if found and found[-1] == self.word:
            return None, 1.0 - self.earned, True
        if not self.left:
            return None, 0.0, True
        if not found or found[-1] not in self.words:
            return f"That is no word of the list. {self.left} left.", 0.0, False
        marks = compare(found[-1], self.word)
        right, before = marks.count("G"), self.most
        self.most = max(right, before)
        nearer = self.shaping * (self.most - before) / len(self.word)
        self.earned += nearer
        return f"{found[-1]} {marks}. {self.left} left.", nearer, False


def compare(guess: str, word: str) -> str:
    """Return a mark for each letter of `guess`: G at its place in `word`, Y at another one, - not in what is left.

    Example:
        >>> compare("allee", "elate")
        'YG-YG'
    """
    left = [letter for letter, own in zip(word, guess, strict=True) if letter != own]
    marks = ""
    for letter, own in zip(guess, word, strict=True):
        if letter == own:
            marks += "G"
        elif letter in left:
            left.remove(letter)
            marks += "Y"
        else:
            marks += "-"
    return marks


def tasks(split: str, words: str, count: int = 256, guesses: int = 6) -> list[dict[str, Any]]:
    """Return `count` prompts, the same for the same split, each with a word under `answer`; a source of data.

    Of the list a tenth is for `eval_split` alone, chosen by the words themselves, so that a split's words never change.
    """
    known = sorted(read_words(words))
    held_out = {word for word in known if random.Random(f"wordle/{word}").random() < 0.1}
    own = sorted({*known} - held_out if split == "train" else held_out)
    if not own:
        raise UserError(f"data.args.words: '{words}' has too few words for a split of its own")
    rng, prompt = random.Random(f"wordle/{split}"), ASKED.format(length=len(known[0]), guesses=guesses)
    return [{"prompt": [{"role": "user", "content": prompt}], "answer": rng.choice(own)} for _ in range(count)]


@cache
def read_words(path: str) -> frozenset[str]:
    """Return the words of a file, one a line, in lower case.

    Raises:
        UserError: it cannot be read, is empty, or holds anything but words of letters, all of one length.
    """
    lines = text_in(path).lower().split("\n")
    words = [line.strip() for line in lines if line.strip()]
    if not words:
        raise UserError(f"words: '{path}' has no words")
    for number, word in enumerate(words, start=1):
        if not _WORD.fullmatch(word) or len(word) != len(words[0]):
            raise UserError(
                f"words: '{path}': word {number}, '{word[:40]}', must be {len(words[0])} letters from a to z"
            )
    return frozenset(words)
