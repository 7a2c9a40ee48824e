"""Chunks: the pieces of contexts that a decode step's work lists are made of."""

from heapq import heapify, heapreplace
from typing import Any, NamedTuple

import numpy as np

LAST_ROUNDS = 2  # chunks dealt out one by one, for each range


class Chunks(NamedTuple):
    """Chunks of all rows of a step, row by row.

    Attributes:
        row: [chunks], the row of each.
        number: [chunks], its place among the row's chunks.
        first: [chunks], the tile of the row that it begins with.
        length: [chunks], in tiles.
        is_last: [chunks] bool, whether it is the row's last one, which has the newest token.
    """

    row: np.ndarray
    number: np.ndarray
    first: np.ndarray
    length: np.ndarray
    is_last: np.ndarray

    def take(self, which: np.ndarray) -> "Chunks":
        """Some of them, by their numbers."""
        return Chunks(*[column.take(which) for column in self])


def slots_of(
    chunks: Chunks, block_tables: np.ndarray, block_size: int, tile: int, spans: int
) -> np.ndarray:
    """Where in the cache the spans of tiles begin, of all tiles of chunks, one after the other:
    [tiles, spans]. What is past the end of a row is anywhere."""
    width = block_tables.shape[1]
    row_begins, length = chunks.row * width, chunks.length
    per_block = block_size * spans // tile  # spans of a block
    if spans == per_block == 1:  # mostly: a tile is a block
        entries = places(length, row_begins + chunks.first)
        return block_tables.take(entries)[:, None] * block_size
    span = places(length, chunks.first)[:, None] * spans + np.arange(spans)
    block, place = np.divmod(span, per_block)
    entries = np.minimum(block, width - 1) + row_begins.repeat(length)[:, None]
    return block_tables.take(entries) * block_size + place * (tile // spans)


def places(lengths: np.ndarray, first: Any = 0) -> np.ndarray:
    """0, 1, ... for each length, or from `first` on: of lengths 2 and 3 that is 0, 1, 0, 1, 2."""
    ends = lengths.cumsum()
    return np.arange(ends[-1]) + (first - ends + lengths).repeat(lengths)


def balance(lengths: np.ndarray, num_ranges: int) -> np.ndarray:
    """[chunks] int16, the range of each chunk: the longest chunk first, each to the range with the
    least so far, which is Graham's rule (1969, doi:10.1137/0117039).

    That is a loop of Python, so only the shortest chunks go by it. Those before them are dealt out
    in rounds, there and back again.
    """
    order = np.argsort(-lengths.astype(np.int16), kind="stable")  # int16: in linear time
    weights = lengths[order] + 1  # the ends of a chunk cost as much as a tile
    rounds = max(0, len(lengths) // num_ranges - LAST_ROUNDS)
    there = np.arange(rounds * num_ranges) % (2 * num_ranges)
    dealt = np.minimum(there, 2 * num_ranges - 1 - there)
    loads = np.bincount(dealt, weights[: len(dealt)], num_ranges).astype(np.int64).tolist()
    heap = [load * num_ranges + index for index, load in enumerate(loads)]
    heapify(heap)
    range_of = np.empty(len(lengths), dtype=np.int16)
    range_of[order[: len(dealt)]] = dealt
    range_of[order[len(dealt) :]] = [
        heapreplace(heap, heap[0] + weight) % num_ranges
        for weight in (weights[len(dealt) :] * num_ranges).tolist()
    ]
    return range_of
