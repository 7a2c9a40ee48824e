"""The work list of decode attention: every token once, in chunks that depend on its row alone."""

import numpy as np
import pytest

from nanovllm.kernels.chunks import balance
from nanovllm.kernels.decode_plan import (
    CHUNK_SHIFT,
    FIRST,
    FUSED_ROWS,
    LAST,
    MANY_ROWS,
    MAX_CHUNKS,
    NEWEST,
    PlanWords,
    decode_tile,
    max_plan_words,
    num_spans,
    plan_decode,
)


@pytest.mark.parametrize("padded_rows", [FUSED_ROWS, 40, MANY_ROWS + 1, 2 * MANY_ROWS + 1])
@pytest.mark.parametrize("num_ranges", [1, 7, 66])
@pytest.mark.parametrize(
    ("block_size", "head_dim"), [(16, 128), (48, 64), (64, 128), (64, 256), (256, 128)]
)
@pytest.mark.parametrize("in_fp8", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_plan_holds_every_token_once(
    seed: int, in_fp8: bool, block_size: int, head_dim: int, num_ranges: int, padded_rows: int
) -> None:
    random = np.random.default_rng(seed)
    edges = [1, 2, 17, 64, 65, 66, 512, 513, 514, 4096, 4097, 4098, 32768, 40960]
    context_lens = random.permutation(edges + random.integers(1, 1500, 20).tolist())
    width = -(-max(context_lens) // block_size)
    tables = random.permutation(len(context_lens) * width).reshape(-1, width).astype(np.int32)
    # A fused kernel has the newest token in registers.
    lengths = context_lens - (padded_rows <= FUSED_ROWS)
    tile = decode_tile(padded_rows, head_dim, in_fp8)
    plan = plan_decode(context_lens, tables, block_size, tile, num_ranges, padded_rows)

    # Chunks lie in any order, each in one piece.
    chunk_of_tile = plan.tiles[:, -1] >> CHUNK_SHIFT
    borders = np.flatnonzero(np.diff(chunk_of_tile, prepend=-1, append=-1))
    assert len(borders) - 1 == len(set(chunk_of_tile))
    in_order = plan.tiles[np.argsort(chunk_of_tile, kind="stable")]
    slots, info = in_order[:, :-1], in_order[:, -1]
    rows, chunks, tokens = info >> 16, (info >> CHUNK_SHIFT) & 31, info & 255
    spans = num_spans(tile, block_size)
    slots = (slots[:, :, None] + np.arange(tile // spans)).reshape(len(info), tile)
    found = [slot for own, count in zip(slots.tolist(), tokens) for slot in own[:count]]
    assert found == [
        tables[row, i // block_size] * block_size + i % block_size
        for row, length in enumerate(lengths)
        for i in range(length)
    ]
    tiles_of_row = np.maximum(1, -(-lengths // tile))
    assert np.bincount(rows).tolist() == tiles_of_row.tolist()
    size = (len(context_lens), max(context_lens), tile, block_size, num_ranges)
    assert len(plan.bounds) + len(plan.chunk_counts) + plan.tiles.size <= max_plan_words(*size)
    counts = np.array([len(set(chunks[rows == row])) for row in range(len(lengths))])
    assert plan.chunk_counts.tolist() == counts.tolist()
    assert counts.min() >= 1 and counts.max() <= MAX_CHUNKS

    first, last, newest = (plan.tiles[:, -1] & flag > 0 for flag in (FIRST, LAST, NEWEST))
    assert np.flatnonzero(first).tolist() == borders[:-1].tolist()
    assert np.flatnonzero(last).tolist() == (borders[1:] - 1).tolist()
    assert (newest == ((chunk_of_tile & 31) == counts[chunk_of_tile >> 5] - 1)).all()

    assert plan.bounds.shape == (num_ranges + 1,)
    assert set(plan.bounds) <= set(borders)
    assert (plan.bounds[0], plan.bounds[-1]) == (0, len(info))
    loads = np.diff(plan.bounds) + np.diff(np.searchsorted(borders, plan.bounds))
    assert loads.max() - loads.min() <= np.diff(borders).max() + 1

    alone = plan_decode(
        context_lens[5:6], tables[5:6], block_size, tile, num_ranges, padded_rows
    ).tiles
    alone = alone[np.argsort(alone[:, -1] >> CHUNK_SHIFT, kind="stable")]
    alone[:, -1] += 5 << 16
    real = (np.arange(spans) * (tile // spans) < tokens[rows == 5, None]).tolist()
    both = zip(alone.tolist(), in_order[rows == 5].tolist(), real, strict=True)
    for one, other, is_real in both:  # what is past the end is anywhere
        assert one[-1] == other[-1]
        assert all(a == b for a, b, r in zip(one, other, is_real) if r)


@pytest.mark.parametrize(
    ("rows", "counts"),
    [
        (1, [1, 2, 8, 5, 10, 32]), (FUSED_ROWS + 1, [1, 1, 4, 3, 5, 32]),
        (MANY_ROWS + 1, [1, 1, 1, 2, 3, 32]), (2 * MANY_ROWS + 1, [1, 1, 1, 1, 2, 32]),
    ],
)  # fmt: skip
def test_chunks_depend_on_the_context_and_the_class_of_the_batch(rows: int, counts: list[int]):
    context_lens = np.array([64, 128, 512, 600, 1200, 40000]) + (rows <= FUSED_ROWS)
    tables = np.arange(6 * 157, dtype=np.int32).reshape(6, 157)
    plan = plan_decode(context_lens, tables, 256, 64, 33, rows)
    assert plan.chunk_counts.tolist() == counts


def test_chunks_are_dealt_out_longest_first_and_their_ends_count():
    assert balance(np.array([1, 1, 2]), 2).tolist() == [1, 1, 0]  # not 1 and 2 against 1
    # Four chunks of 2 cost 12, one of 10 costs 11: the fifth goes there, though it has more tiles.
    assert balance(np.array([10, 2, 2, 2, 2, 2]), 2).tolist() == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(("rows", "padded_rows"), [(1, 1), (3, 4), (7, 8), (20, 200)])
@pytest.mark.parametrize(("block_size", "in_fp8"), [(64, False), (256, False), (128, True)])
def test_words_that_grow_are_those_of_a_plan_made_anew(
    rows: int, padded_rows: int, block_size: int, in_fp8: bool
) -> None:
    random = np.random.default_rng(rows)
    context_lens = random.integers(1, 1100, rows)
    tables = random.permutation(rows * 20).reshape(rows, 20).astype(np.int32)
    tile = decode_tile(padded_rows, 64, in_fp8)

    def planned() -> PlanWords:
        plan = plan_decode(context_lens, tables, block_size, tile, 7, padded_rows)
        return PlanWords(plan, padded_rows, tile)

    kept, times_anew = planned(), 0
    for _ in range(2 * tile):
        has_room = ((context_lens - (padded_rows <= FUSED_ROWS)) % tile > 0).all()
        context_lens = context_lens + 1
        grown = kept.grow()
        assert grown or not has_room
        if not grown:
            kept, times_anew = planned(), times_anew + 1
        assert kept.words.tolist() == planned().words.tolist()
    assert 2 <= times_anew <= 2 * rows + 2
