"""The work list of prefill attention: tiles of queries, those that see most keys first.

A step's rows bring any number of queries each. Up to 64 of a row make a tile, and the tiles of all
rows are listed on the host, once a step. A grid of all rows times the tiles of the longest would be
mostly empty. Tiles that see many keys come first, so that those which run last are short.
"""

from typing import Any, NamedTuple

import numpy as np

WORDS = 5  # int32, of a tile
SHORT_TILE, TILE = 16, 64


class PrefillPlan(NamedTuple):
    """What a step of prefill attention is made of.

    Attributes:
        tiles: [tiles, WORDS] int32, for each the index of its first query, its number of queries,
            the position of the first in its sequence, its row, and the tokens of the row's context.
            The last ones may have no queries.
        tile: queries of a tile, at the most.
        max_seqlen_q: no row has more queries.
        max_context_len: no row's context is longer.
    """

    tiles: Any
    tile: int
    max_seqlen_q: int
    max_context_len: int

    @classmethod
    def views(
        cls, buffer: Any, rows: int, tokens: int, max_seqlen_q: int, max_context_len: int
    ) -> "PrefillPlan":
        """The plan of so many rows and queries, as it lies in a buffer of NumPy or torch."""
        tile = SHORT_TILE if max_seqlen_q <= SHORT_TILE else TILE
        most = tokens // tile + rows
        tiles = buffer[: most * WORDS].reshape(most, WORDS)
        return cls(tiles, tile, max_seqlen_q, max_context_len)

    def fill(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """List the tiles of a step, in a buffer of NumPy.

        Args:
            starts: [rows], where in its sequence each row's first query stands.
            lengths: [rows], its number of queries, at least 1.
        """
        tiles_of_rows = -(-lengths // self.tile)
        rows = np.repeat(np.arange(len(lengths)), tiles_of_rows)
        before = np.arange(len(rows)) - (tiles_of_rows.cumsum() - tiles_of_rows)[rows]
        before *= self.tile  # queries of the same row
        counts = np.minimum(lengths[rows] - before, self.tile)
        positions = starts[rows] + before
        first_queries = (lengths.cumsum() - lengths)[rows] + before
        columns = [first_queries, counts, positions, rows, (starts + lengths)[rows]]
        by_keys = np.argsort(-(positions + counts), kind="stable")
        self.tiles[: len(rows)] = np.stack(columns, axis=1)[by_keys]
        self.tiles[len(rows) :] = 0


def max_prefill_words(rows: int, tokens: int) -> int:
    """The most words that the plan of so many rows and queries, or of fewer, can have."""
    return (rows + max(rows, tokens // TILE)) * WORDS
