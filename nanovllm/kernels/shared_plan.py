"""The work list of `kernels.shared_attention`: chunks that several rows of a decode step share.

Rows whose block tables begin with the same blocks (completions of one prompt, requests with a
common system prompt) share their first tokens' keys and values. A chunk that lies within that
common part, and that all these rows have, is read once for up to `PIECE_ROWS` rows, a piece, in
place of once a row. A row has the same chunks whether others share them or not.

The list is one array of int32. What it refers to in itself it refers to by the number of the word:

    [ranges + 1]     where each range's pieces begin
    [pieces + 1, 3]  of each piece: where its rows begin, where its tiles begin, the chunk's number;
                     the last is no piece, but where the others' rows and tiles end
    [rows]           rows of the batch, piece by piece
    [tiles, spans]   the first slot of each span of a tile, piece by piece; all tiles are full
"""

import numpy as np

from nanovllm.kernels.chunks import Chunks, balance, places, slots_of

PIECE_ROWS = 16
PIECE_WORDS = 3
# A step shares nothing if that would spare fewer tokens' keys and values: it would not pay for one
# more kernel a layer. By the bytes, 2,500 tokens of 8 kv heads of 128 take as long to read as a
# launch.
FEWEST_SPARED_TOKENS = 4096


def max_shared_words(rows: int, num_ranges: int, spans: int) -> int:
    """The most int32 words that sharing adds to a plan of so many rows.

    A tile in the plan of one row takes a word more than it has spans. A piece of `rows` rows and
    `tiles` tiles takes 3 + rows + spans * tiles, in place of (spans + 1) * rows * tiles: more only
    where it has one tile. Chunks have two or more, but for one of a row: that before the border.
    """
    return num_ranges + 1 + PIECE_WORDS + rows + spans + 1  # whole tiles are copied


def begin_alike(block_tables: np.ndarray) -> bool:
    """Whether any two rows have the same first block."""
    first = np.sort(block_tables[:, 0])
    return bool((first[1:] == first[:-1]).any())


def plan_shared(
    chunks: Chunks,
    block_tables: np.ndarray,
    block_size: int,
    tile: int,
    spans: int,
    num_ranges: int,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Which chunks of a step's rows are shared, and the list of the work that they are.

    Args:
        chunks: of all rows.
        block_tables: [rows, width]; whatever is past the end of a row's.
        tile: tokens of a tile.
        spans: of a tile.
        num_ranges: that the pieces are dealt out to.

    Returns:
        ([chunks] bool, [words] int32), or None if sharing would spare too little.
    """
    # The last chunk of a row has the newest token, in a block of its own.
    candidates = np.flatnonzero(~chunks.is_last)
    if not len(candidates):
        return None
    group = _groups(chunks.take(candidates), block_tables, block_size, tile)
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    place = places(sizes)  # of a chunk in its group
    sizes = np.minimum(PIECE_ROWS, np.repeat(sizes, sizes) - place // PIECE_ROWS * PIECE_ROWS)
    is_shared = sizes > 1
    begins = is_shared & (place % PIECE_ROWS == 0)
    members = chunks.take(candidates[order[is_shared]])
    pieces = chunks.take(candidates[order[begins]])  # each as its first row has it
    sizes = sizes[begins]
    if ((sizes - 1) * pieces.length).sum() * tile < FEWEST_SPARED_TOKENS:
        return None
    mask = np.zeros(len(chunks.row), dtype=bool)
    mask[candidates[order[is_shared]]] = True

    # Range by range.
    range_of = balance(pieces.length, num_ranges)
    order = np.argsort(range_of, kind="stable")
    first_member = (np.cumsum(sizes) - sizes)[order]
    pieces, sizes = pieces.take(order), sizes[order]
    rows = members.row[np.repeat(first_member, sizes) + places(sizes)]
    slots = slots_of(pieces, block_tables, block_size, tile, spans).ravel()

    bounds_end = num_ranges + 1
    rows_begin = bounds_end + PIECE_WORDS * (len(sizes) + 1)
    slots_begin = rows_begin + len(rows)
    words = np.empty(slots_begin + len(slots), dtype=np.int32)
    words[0] = bounds_end
    per_range = np.bincount(range_of, minlength=num_ranges)
    words[1:bounds_end] = bounds_end + PIECE_WORDS * np.cumsum(per_range)
    records = words[bounds_end:rows_begin].reshape(-1, PIECE_WORDS)
    records[0] = rows_begin, slots_begin, 0
    records[1:, 0] = rows_begin + np.cumsum(sizes)
    records[1:, 1] = slots_begin + spans * np.cumsum(pieces.length)
    records[:, 2] = *pieces.number, 0
    words[rows_begin:slots_begin] = rows
    words[slots_begin:] = slots
    return mask, words


def _groups(chunks: Chunks, block_tables: np.ndarray, block_size: int, tile: int) -> np.ndarray:
    """[chunks], the number of each one's group: the same for chunks of the same place and length in
    rows that have the same blocks up to its end."""
    ends = -(-(chunks.first + chunks.length) * tile // block_size)  # in blocks
    depths, which = np.unique(ends, return_inverse=True)
    # With the rows in the order of their tables, as bytes, those that begin alike are neighbours.
    tables = np.ascontiguousarray(block_tables[:, : depths[-1]])
    order = tables.view(f"V{tables.itemsize * tables.shape[1]}")[:, 0].argsort(kind="stable")
    tables = tables[order]
    differs = tables[1:] != tables[:-1]
    # Blocks that each row begins with as the one before does.
    common = np.where(differs.any(axis=1), differs.argmax(axis=1), depths[-1])
    run = np.zeros((len(depths), len(tables)), dtype=np.int64)
    run[:, order[1:]] = (common < depths[:, None]).cumsum(axis=1)
    key = run[which, chunks.row]
    for column in (chunks.number, chunks.first, chunks.length):
        key = key * (int(column.max()) + 1) + column
    return np.unique(key, return_inverse=True)[1]
