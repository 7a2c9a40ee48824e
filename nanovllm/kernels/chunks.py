"""Chunks: the pieces of contexts that a decode step's work lists are made of."""

from heapq import heapreplace
from typing import NamedTuple

import numpy as np


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
        """Some of them: a mask, or their numbers."""
        return Chunks(*(column[which] for column in self))


def slots_of(
    row: np.ndarray,
    start: np.ndarray,
    block_tables: np.ndarray,
    block_size: int,
    tile: int,
    spans: int,
) -> np.ndarray:
    """Where in the cache the spans of tiles begin that begin with the tokens number `start` of
    rows: [tiles, spans]. What is past the end of a row is anywhere."""
    starts = start[:, None] + np.arange(0, tile, tile // spans)
    column = np.minimum(starts // block_size, block_tables.shape[1] - 1)
    return block_tables[row[:, None], column] * block_size + starts % block_size


def places(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... for each length: of lengths 2 and 3 that is 0, 1, 0, 1, 2."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)


def balance(lengths: np.ndarray, num_ranges: int) -> np.ndarray:
    """The range of each chunk: the longest chunk first, each to the range with the least so far.

    Graham's rule (1969, doi:10.1137/0117039).
    """
    range_of = np.empty(len(lengths), dtype=np.int64)
    loads = list(range(num_ranges))  # a heap of load * num_ranges + range
    weights = (lengths + 1) * num_ranges  # the ends of a chunk cost as much as a tile
    order = np.argsort(-lengths, kind="stable")
    for chunk, weight in zip(order.tolist(), weights[order].tolist()):
        range_of[chunk] = loads[0] % num_ranges
        heapreplace(loads, loads[0] + weight)
    return range_of
