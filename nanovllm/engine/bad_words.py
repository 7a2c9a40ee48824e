"""Words that a completion must not have."""

from collections import deque
from collections.abc import Iterable

import numpy as np

from nanovllm.engine.tokenizer import Tokenizer

TokenIds = tuple[int, ...]


def spellings(words: Iterable[str], tokenizer: Tokenizer) -> tuple[TokenIds, ...]:
    """The tokens of each word at the start of a text and, if these are other ones, after a space.

    As in vLLM, the word after a space counts only if the space is part of its first token, and adds
    none: where it is a token of its own, the word itself has the tokens that it has at the start.

    Raises:
        ValueError: for a word that has no tokens, or is not Unicode text.
    """
    found: dict[TokenIds, None] = {}
    for word in words:
        try:
            bare, spaced = (
                tuple(tokenizer.encode(space + word.lstrip(), add_special_tokens=False))
                for space in ("", " ")
            )
        except (TypeError, UnicodeError) as error:
            raise ValueError(f"bad_words: {word!r} is not valid Unicode text: {error}") from error
        if not bare:
            raise ValueError(f"bad_words: {word!r} has no tokens in this tokenizer")
        found[bare] = None
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            found[spaced] = None
    return tuple(found)


class BadWords:
    """A `TokenConstraint`: no token may complete one of some sequences of tokens.

    Args:
        spellings: the sequences, as `spellings` makes them; only generated tokens count.
    """

    is_complete = False

    def __init__(self, spellings: tuple[TokenIds, ...]) -> None:
        self._spellings = spellings
        self._last: deque[int] = deque(maxlen=max(map(len, spellings)) - 1)

    def accept(self, token_id: int) -> None:
        self._last.append(token_id)

    def restrict(self, mask: np.ndarray) -> None:
        """Clears the bits of the tokens that would complete a word; none if no other may come, as
        after the beginning of the only choice."""
        last = tuple(self._last)
        words = mask.view(np.uint32)
        before = []
        for *beginning, token_id in self._spellings:
            if last[len(last) - len(beginning) :] == tuple(beginning):
                index, bit = divmod(token_id, 32)
                before.append((index, words[index]))
                words[index] &= ~np.uint32(1 << bit)
        if before and not words.any():
            for index, word in reversed(before):
                words[index] = word
