"""Words that a completion must not have."""

from collections.abc import Iterable, Iterator

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


class WordTable:
    """Words that are looked for together, for the `BadWords` of many completions.

    Args:
        spellings: the sequences of tokens, as `spellings` makes them.

    Attributes:
        beginnings: all that a word may begin with, the empty one among them.
        last: the tokens that complete a word, by all its tokens before.
    """

    def __init__(self, spellings: tuple[TokenIds, ...]) -> None:
        self.beginnings = {word[:n] for word in spellings for n in range(len(word))}
        self.last: dict[TokenIds, list[int]] = {}
        for *before, token_id in spellings:
            self.last.setdefault(tuple(before), []).append(token_id)


class BadWords:
    """A `TokenConstraint`: no token may complete one of some words.

    Args:
        table: of the words; only generated tokens count.
    """

    is_complete = False

    def __init__(self, table: WordTable) -> None:
        self._table = table
        self._under_way: TokenIds = ()  # the longest beginning that the text ends with

    def accept(self, token_id: int) -> None:
        under_way = (*self._under_way, token_id)
        while under_way not in self._table.beginnings:
            under_way = under_way[1:]
        self._under_way = under_way

    @property
    def allows_all(self) -> bool:
        return not any(self._banned())

    def restrict(self, mask: np.ndarray) -> None:
        """Clears the bits of the tokens that would complete a word; none if no other may come, as
        after the beginning of the only choice."""
        words = mask.view(np.uint32)
        before = []
        for token_ids in self._banned():
            for token_id in token_ids:
                index, bit = divmod(token_id, 32)
                before.append((index, words[index]))
                words[index] &= ~np.uint32(1 << bit)
        if before and not words.any():
            for index, word in reversed(before):
                words[index] = word

    def _banned(self) -> Iterator[list[int]]:
        """What would complete a word, of each beginning that the text ends with."""
        last, under_way = self._table.last, self._under_way
        for start in range(len(under_way) + 1):
            if (token_ids := last.get(under_way[start:])) is not None:
                yield token_ids
