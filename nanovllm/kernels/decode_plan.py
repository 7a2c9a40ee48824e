"""The work list of a decode step of `kernels.decode_attention`, made on the host with NumPy.

Contexts are cut into chunks at fixed places, and chunks are dealt out to ranges of about equal
length, one for each program of a kv head. A range is a list of tiles of up to 64 tokens, or 128 in
fp8, which may go from one block to the next, and from one sequence to the next: the load is even
however ragged the batch, and no program is launched for a context that might have been longer.

Chunks that several rows share, block for block, go to another list, that of `kernels.shared_plan`.
"""

from typing import Any, NamedTuple

import numpy as np

from nanovllm.kernels.chunks import Chunks, balance, places, slots_of
from nanovllm.kernels.shared_plan import begin_alike, max_shared_words, plan_shared

MAX_CHUNKS = 32
FUSED_ROWS = 4  # up to so many rows, the kernel stores the newest token itself
MANY_ROWS = 64
# A tile's last word: 15 bits for the row, 1 spare, 5 for the chunk, 3 flags, 8 for the tokens.
TOKENS, FIRST, LAST, NEWEST = 255, 256, 512, 1024
CHUNK_SHIFT = 11


class DecodePlan(NamedTuple):
    """The work of a decode step: of NumPy as it is made, of torch on the device. All int32.

    Attributes:
        bounds: [ranges + 1], where each range of tiles begins.
        chunk_counts: [rows]; 0 for a padding row.
        tiles: [tiles, spans + 1], the first slot of each span of a tile, tokens that lie side by
            side in a block, and what the tile is: row, chunk, flags, tokens, from the high bits
            down.
        list_begin: [1], the word of `tiles` where the list of `kernels.shared_plan` begins; None:
            nothing is shared.
    """

    bounds: Any
    chunk_counts: Any
    tiles: Any
    list_begin: Any = None

    @classmethod
    def views(
        cls, buffer: Any, rows: int, num_ranges: int, spans: int, shares: bool = False
    ) -> "DecodePlan":
        """Its place in an int32 buffer of `max_plan_words`."""
        second = _aligned(num_ranges + 1)
        third = second + _aligned(rows)
        fourth = third + _aligned(1)
        width = spans + 1
        return cls(
            buffer[: num_ranges + 1],
            buffer[second : second + rows],
            buffer[fourth : fourth + (len(buffer) - fourth) // width * width].reshape(-1, width),
            buffer[third : third + 1] if shares else None,
        )

    def with_list(self, words: np.ndarray) -> "DecodePlan":
        """A plan of NumPy, with a list of `kernels.shared_plan`."""
        begin, width = self.tiles.size, self.tiles.shape[1]
        filler = words[: -len(words) % width]
        tiles = np.concatenate((self.tiles.ravel(), words, filler))
        return self._replace(
            tiles=tiles.reshape(-1, width), list_begin=np.array([begin], dtype=np.int32)
        )


class PlanWords:
    """A plan as it lies in the buffer of a step, and of the steps after it as long as every row
    grows by a token a step, within its last tile: then only that tile's tokens are counted up.

    Args:
        plan: of NumPy.
        rows: that the kernel will get.
        tile: tokens of a tile.

    Attributes:
        words: [any number] int32.
        shares: whether there is a list of `kernels.shared_plan`.
    """

    def __init__(self, plan: DecodePlan, rows: int, tile: int) -> None:
        num_ranges, (tiles, width) = len(plan.bounds) - 1, plan.tiles.shape
        self.shares = plan.list_begin is not None
        begin = _aligned(num_ranges + 1) + _aligned(rows) + _aligned(1)
        self.words = np.zeros(begin + tiles * width, dtype=np.int32)
        views = DecodePlan.views(self.words, rows, num_ranges, width - 1, self.shares)
        views.bounds[:] = plan.bounds
        views.chunk_counts[: len(plan.chunk_counts)] = plan.chunk_counts
        views.tiles[:] = plan.tiles
        if self.shares:
            views.list_begin[:] = plan.list_begin
        self._tile, self._info = tile, views.tiles[: plan.bounds[-1], -1]
        self._newest: np.ndarray | None = None  # tile of each row that has the newest token

    def grow(self) -> bool:
        """Go on to the step in which each context is a token longer. False, and nothing is changed,
        if a tile is full."""
        if self._newest is None:
            self._newest = np.flatnonzero((self._info & (LAST | NEWEST)) == LAST | NEWEST)
            self._room = self._tile - int((self._info[self._newest] & TOKENS).max())
        if not self._room:
            return False
        self._room -= 1
        self._info[self._newest] += 1
        return True


def _aligned(size: int) -> int:
    """Kernels are compiled for addresses that are multiples of 16 bytes."""
    return -(-size // 4) * 4


def decode_tile(rows: int, head_dim: int, in_fp8: bool) -> int:
    """Tokens of a tile in a step of so many rows.

    In fp8 they are twice as many, in as many bytes. With few rows they are not: there more programs
    are worth more. Heads wider than 128 leave room for half as many.
    """
    tile = 64 if head_dim <= 128 else 32
    return 2 * tile if in_fp8 and rows > FUSED_ROWS else tile


def num_spans(tile: int, block_size: int) -> int:
    """Into how many spans of equal length, each within a block, a tile is cut."""
    return max(1, tile // (block_size & -block_size))


def max_plan_words(
    rows: int, max_context_len: int, tile: int, block_size: int, num_ranges: int
) -> int:
    """int32 words of the largest plan of a step of so many rows."""
    tiles, spans = rows * -(-max_context_len // tile), num_spans(tile, block_size)
    words = _aligned(num_ranges + 1) + _aligned(rows) + _aligned(1) + (spans + 1) * tiles
    return words + max_shared_words(rows, num_ranges, spans)


def plan_decode(
    context_lens: np.ndarray,
    block_tables: np.ndarray,
    block_size: int,
    tile: int,
    num_ranges: int,
    padded_rows: int,
    borders: np.ndarray | None = None,
) -> DecodePlan:
    """Cut the contexts of a step into tiles and ranges.

    Args:
        context_lens: [rows], the newest token included.
        block_tables: [rows, width].
        tile: tokens of a tile, from `decode_tile`.
        num_ranges: from `num_decode_ranges`.
        padded_rows: the rows that the kernel will get.
        borders: [rows], the token that is to begin a chunk, the first of a block; 0, or past a
            row's context: none. Steps of few rows do without.
    """
    fused = padded_rows <= FUSED_ROWS
    cached = context_lens - 1 if fused else context_lens
    num_tiles = np.maximum(1, -(-cached // tile))  # of each row
    border = None
    if not fused and borders is not None:
        border = np.where(borders < cached, borders, 0) // tile
    chunks, chunk_counts = _cut(num_tiles, tile, padded_rows, border)
    shared, spans = None, num_spans(tile, block_size)
    if not fused and begin_alike(block_tables):
        shared = plan_shared(chunks, block_tables, block_size, tile, spans, num_ranges)
    if shared is not None:
        chunks = chunks.take(np.flatnonzero(~shared[0]))
    range_of = balance(chunks.length, num_ranges)
    bounds = np.zeros(num_ranges + 1, dtype=np.int32)
    bounds[1:] = np.bincount(range_of, chunks.length, num_ranges).cumsum()

    # Range by range.
    chunks = chunks.take(np.argsort(range_of, kind="stable"))
    ends = chunks.length.cumsum()
    tiles = np.empty((ends[-1], spans + 1), dtype=np.int32)
    tiles[:, :-1] = slots_of(chunks, block_tables, block_size, tile, spans)
    row, is_last, info = chunks.row, chunks.is_last, tiles[:, -1]
    words = row << 16 | chunks.number << CHUNK_SHIFT | is_last * NEWEST | tile
    info[:] = words.repeat(chunks.length)
    info[ends - chunks.length] += FIRST
    info[ends - 1] += LAST
    # All tiles are full but the last one of a row.
    info[ends[is_last] - 1] -= (num_tiles * tile - cached)[row[is_last]]
    plan = DecodePlan(bounds, chunk_counts.astype(np.int32), tiles)
    return plan if shared is None else plan.with_list(shared[1])


def _cut(
    num_tiles: np.ndarray, tile: int, padded_rows: int, border: np.ndarray | None
) -> tuple[Chunks, np.ndarray]:
    """Chunks of rows of so many tiles, and how many each row has. `border`: the tile of each that
    is to begin a chunk, 0 for none."""
    # Tiles of a row's chunks: finer ones give more programs and ranges of more even lengths,
    # coarser ones fewer partial results.
    if padded_rows > MANY_ROWS:
        per_chunk: Any = (512 if padded_rows <= 2 * MANY_ROWS else 1024) // tile
    else:
        finest = max(tile, 64 if padded_rows <= FUSED_ROWS else 128) // tile
        per_chunk = np.where(num_tiles <= 512 // tile, finest, 2 * finest)
    # On both sides of a border a chunk may be cut short.
    most = MAX_CHUNKS if border is None else MAX_CHUNKS - (border > 0)
    per_chunk = np.maximum(per_chunk, -(-num_tiles // most))
    if border is None:
        chunk_counts = -(-num_tiles // per_chunk)
    else:
        before = -(-border // per_chunk)
        chunk_counts = before - (border - num_tiles) // per_chunk

    # Of each chunk: its row, its place in the row, its tiles.
    row, number = np.arange(len(num_tiles)).repeat(chunk_counts), places(chunk_counts)
    full = per_chunk.take(row)
    first, end = number * full, num_tiles.take(row)
    if border is not None:
        is_before = number < before[row]
        first -= (before * per_chunk - border)[row] * ~is_before
        end = np.where(is_before, border[row], end)
    length = np.minimum(full, end - first)
    is_last = np.zeros(len(row), dtype=np.bool_)
    is_last[chunk_counts.cumsum() - 1] = True
    return Chunks(row, number, first, length, is_last), chunk_counts
