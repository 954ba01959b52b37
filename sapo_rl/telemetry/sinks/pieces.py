"""The text of each token of a stream, so that the pieces together are its text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are no whole character."""
PENDING = 3
"""Bytes of a character, of four at most, that may stand at the end of a text and wait for its last one."""


class Pieces:
    """Cuts the text of token ids into one piece for each, special tokens included.

    Of a character whose bytes are several tokens, the last has the text, and those before it have none. Most tokens
    have the same text wherever they stand, and are decoded once.

    Example:
        >>> Pieces(tokenizer)(tokenizer("one 🦥").input_ids)
        ['one', ' ', '', '', '🦥']
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a", add_special_tokens=False)
        """What stands before the ids to decode: some tokenizers take the space from the first token of a text."""
        self._before = self._whole(self._anchor)
        self._known: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """Return a text for each id."""
        for one in set(ids) - self._known.keys():
            self._known[one] = self._decode([one])
        found = [self._known[one] for one in ids]
        start = 0
        for end, alone in enumerate([*found, ""]):
            if BROKEN not in alone:
                if start < end:
                    found[start:end] = self._joined(ids[start:end])
                start = end + 1
        return found

    def _joined(self, ids: Sequence[int]) -> list[str]:
        """The pieces of tokens none of which is text by itself."""
        found: list[str] = []
        start = 0
        for end in range(1, len(ids) + 1):
            text = self._decode(ids[start:end])
            if not text.endswith(BROKEN) or end == len(ids):
                found.append(text)
                start = end
                continue
            found.append("")  # more bytes of its last character may follow
            done = end - PENDING
            if (
                done - start > PENDING
                and (before := self._decode(ids[start:done])) + self._decode(ids[done:end]) == text
            ):
                found[done - 1] = before  # so that each text is short, however long a stream of half characters is
                start = done
        return found

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._whole([*self._anchor, *ids])
        return text[len(self._before) :] if text.startswith(self._before) else self._whole(ids)

    def _whole(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
