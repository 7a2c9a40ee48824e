"""The work list of a decode step of `kernels.decode_attention`, made on the host with NumPy.

Contexts are cut into chunks at fixed places, and chunks are dealt out to ranges of about equal
length, one for each program of a kv head. A range is a list of tiles of up to 64 tokens, which may
go from one sequence to the next: the load is even however ragged the batch, and no program is
launched for a context that might have been longer.
"""

from heapq import heapreplace
from typing import Any, NamedTuple

import numpy as np

MAX_CHUNKS = 32
FUSED_ROWS = 4  # up to so many rows, the kernel stores the newest token itself
MANY_ROWS = 64
# A tile's second word: 15 bits for the row, 1 spare, 6 for the chunk, 3 flags, 7 for the tokens.
FIRST, LAST, NEWEST = 128, 256, 512


class DecodePlan(NamedTuple):
    """The work of a decode step: of NumPy as it is made, of torch on the device. All int32.

    Attributes:
        bounds: [ranges + 1], where each range of tiles begins.
        chunk_counts: [rows]; 0 for a padding row.
        tiles: [tiles, 2], the first slot of a tile and what it is: row, chunk, flags, tokens, from
            the high bits down.
    """

    bounds: Any
    chunk_counts: Any
    tiles: Any

    @classmethod
    def views(cls, buffer: Any, rows: int, num_ranges: int) -> "DecodePlan":
        """Its place in an int32 buffer of `max_plan_words`."""
        second = _aligned(num_ranges + 1)
        third = second + _aligned(rows)
        return cls(
            buffer[: num_ranges + 1],
            buffer[second : second + rows],
            buffer[third : third + (len(buffer) - third) // 2 * 2].reshape(-1, 2),
        )


def _aligned(size: int) -> int:
    """Kernels are compiled for addresses that are multiples of 16 bytes."""
    return -(-size // 4) * 4


def max_plan_words(rows: int, max_context_len: int, tile: int, num_ranges: int) -> int:
    """int32 words of the largest plan of a step of so many rows."""
    tiles = rows * -(-max_context_len // tile)
    return _aligned(num_ranges + 1) + _aligned(rows) + 2 * tiles


def plan_decode(
    context_lens: np.ndarray,
    block_tables: np.ndarray,
    block_size: int,
    tile: int,
    num_ranges: int,
    padded_rows: int,
) -> DecodePlan:
    """Cut the contexts of a step into tiles and ranges.

    Args:
        context_lens: [rows], the newest token included.
        block_tables: [rows, width].
        tile: tokens of a tile, from `tile_tokens`.
        num_ranges: from `num_decode_ranges`.
        padded_rows: the rows that the kernel will get.
    """
    fused = padded_rows <= FUSED_ROWS
    cached = context_lens - 1 if fused else context_lens
    counts = np.maximum(1, -(-cached // tile))  # tiles of a row
    # Tokens of a row's chunks: finer ones give more programs and ranges of more even lengths,
    # coarser ones fewer partial results.
    finest = 64 if fused else 128
    chunk = np.where(cached <= 512, finest, 2 * finest)
    if padded_rows > MANY_ROWS:
        chunk[:] = 512 if padded_rows <= 2 * MANY_ROWS else 1024
    long = cached > chunk * MAX_CHUNKS
    chunk[long] = -(-cached[long] // (MAX_CHUNKS * tile)) * tile
    per_chunk = chunk // tile
    chunk_counts = -(-counts // per_chunk)

    # Of each chunk: its row, its place in the row, its tiles.
    ends = np.cumsum(chunk_counts)
    row = np.repeat(np.arange(len(counts)), chunk_counts)
    index = np.arange(ends[-1]) - (ends - chunk_counts)[row]
    length = np.minimum(per_chunk[row], counts[row] - index * per_chunk[row])
    range_of = _balance(length, num_ranges)
    bounds = np.zeros(num_ranges + 1, dtype=np.int32)
    bounds[1:] = np.bincount(range_of, length, num_ranges).cumsum()

    # Of each tile, range by range: its chunk, and its place there.
    order = np.argsort(range_of, kind="stable")
    ends = np.cumsum(length[order])
    chunk_of = np.repeat(order, length[order])
    place = np.arange(ends[-1]) - np.repeat(ends - length[order], length[order])
    row, index = row[chunk_of], index[chunk_of]
    start = (index * per_chunk[row] + place) * tile
    tiles = np.empty((len(row), 2), dtype=np.int32)
    tiles[:, 0] = block_tables[row, start // block_size] * block_size + start % block_size
    tiles[:, 1] = row << 16 | index << 10 | np.minimum(cached[row] - start, tile)
    tiles[:, 1] += (place == 0) * FIRST + (place == length[chunk_of] - 1) * LAST
    tiles[:, 1] += (index == chunk_counts[row] - 1) * NEWEST
    return DecodePlan(bounds, chunk_counts.astype(np.int32), tiles)


def _balance(lengths: np.ndarray, num_ranges: int) -> np.ndarray:
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
