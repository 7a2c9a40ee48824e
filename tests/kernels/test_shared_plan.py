"""The list of shared chunks: with the list of the others it has every chunk of every row once."""

import numpy as np
import pytest

from helpers.shared_blocks import Shared, chunks_in, random_tables, share_blocks, shared_pieces
from nanovllm.kernels import decode_plan, shared_plan
from nanovllm.kernels.decode_plan import FUSED_ROWS, MAX_CHUNKS, max_plan_words, plan_decode
from nanovllm.kernels.shared_plan import PIECE_ROWS

BLOCK, TILE, RANGES = 64, 64, 7


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharing spares enough, however little it is."""
    monkeypatch.setattr(shared_plan, "FEWEST_SPARED_TOKENS", 1)


def plan(lens, tables, rows=None, borders=None, block=BLOCK, tile=TILE) -> decode_plan.DecodePlan:
    lens = np.asarray(lens)
    borders = None if borders is None else np.asarray(borders)
    return plan_decode(lens, tables, block, tile, RANGES, rows or len(lens), borders)


def plan_of(lens: list[int], shared: list[Shared], rows=None, borders=None):
    tables = random_tables(len(lens), -(-max(lens) // BLOCK))
    share_blocks(tables, shared, BLOCK)
    return plan(lens, tables, rows, borders)


def sharers(found: decode_plan.DecodePlan) -> list[tuple[list[int], int, int]]:
    """(rows, chunk, tiles), sorted."""
    return sorted((rows, chunk, len(slots)) for rows, chunk, slots in shared_pieces(found))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("seed", range(16))
def test_both_lists_have_every_chunk_once_and_its_borders_do_not_depend_on_company(seed: int):
    random = np.random.default_rng(seed)
    rows = int(random.integers(FUSED_ROWS + 1, 90))
    block, tile = ((16, 64), (48, 64), (64, 64), (256, 64), (80, 128))[seed % 5]
    lens = np.exp(random.uniform(0, np.log(3000), rows)).astype(int) + 1
    lens[random.random(rows) < 0.5] = int(random.integers(300, 12000))  # as siblings are
    tables = random_tables(rows, -(-lens.max() // block), seed)
    alone = tables.copy()
    borders = np.zeros(rows, dtype=int)
    for _ in range(int(random.integers(1, 6))):
        some = np.flatnonzero(random.random(rows) < random.random())
        if len(some):
            common = (lens[some].min() - 1) // block * block
            share_blocks(tables, [(some.tolist(), common)], block)
            if random.random() < 0.5:
                borders[some] = common
    for padded_rows in (rows, 100, 200):
        found = plan(lens, tables, padded_rows, borders, block, tile)
        chunks = chunks_in(found, tile)
        size = found.bounds.size + rows + found.tiles.size
        assert size <= max_plan_words(rows, lens.max(), tile, block, RANGES)
        for row, length in enumerate(lens):
            count = int(found.chunk_counts[row])
            slots = [slot for chunk in range(count) for slot in chunks.pop((row, chunk))]
            tokens = np.arange(length)
            expected = tables[row, tokens // block] * block + tokens % block
            assert slots == expected.tolist()
        assert not chunks
        assert all(len(piece[0]) in range(2, PIECE_ROWS + 1) for piece in shared_pieces(found))
        # The same batch with blocks of its own for every row.
        without = plan(lens, alone, padded_rows, borders, block, tile)
        assert without.list_begin is None
        assert without.chunk_counts.tolist() == found.chunk_counts.tolist()
        lengths = {key: len(slots) for key, slots in chunks_in(found, tile).items()}
        assert lengths == {key: len(slots) for key, slots in chunks_in(without, tile).items()}
        row = int(random.integers(rows))
        only = plan(lens[[row]], tables[[row]], padded_rows, borders[[row]], block, tile)
        counts = {chunk: len(slots) for (_, chunk), slots in chunks_in(only, tile).items()}
        assert counts == {chunk: n for (r, chunk), n in lengths.items() if r == row}


@pytest.mark.usefixtures("always")
def test_rows_share_the_whole_chunks_in_their_common_blocks():
    lens = [400, 410, 420, 430, 440]  # chunks of 128
    found = plan_of(lens, [([0, 2, 4], 128 + 64), ([1, 3], 256)])
    assert sharers(found) == [([0, 2, 4], 0, 2), ([1, 3], 0, 2), ([1, 3], 1, 2)]


@pytest.mark.usefixtures("always")
def test_a_prefix_within_a_prefix():
    found = plan_of([400] * 6, [(range(6), 128), ([1, 4, 5], 256)])
    assert sharers(found) == [([0, 1, 2, 3, 4, 5], 0, 2), ([1, 4, 5], 1, 2)]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("rows", [5, 70, 200])
def test_a_border_is_the_end_of_a_chunk_in_every_class(rows: int):
    found = plan_of([700] * 3, [(range(3), 448)], rows, [448] * 3)
    shared_tokens = sum(64 * tiles for _, _, tiles in sharers(found))
    assert shared_tokens == 448
    without = plan_of([700] * 3, [(range(3), 448)], rows)
    assert sum(64 * tiles for _, _, tiles in sharers(without)) == {5: 256, 70: 0, 200: 0}[rows]


@pytest.mark.usefixtures("always")
def test_chunks_of_other_lengths_are_not_shared():
    found = plan_of([400, 600, 400, 600, 9000], [(range(5), 320)])
    assert sharers(found) == [([0, 2], 0, 2), ([0, 2], 1, 2), ([1, 3], 0, 4)]


@pytest.mark.usefixtures("always")
def test_same_blocks_after_other_ones_are_not_shared():
    tables = random_tables(5, 7)
    tables[:2, 0] = tables[0, 0]
    tables[1:, 1:4] = tables[1, 1:4]
    assert sharers(plan([400] * 5, tables)) == []
    tables[:2, :2] = tables[0, :2]
    assert sharers(plan([400] * 5, tables)) == [([0, 1], 0, 2)]


@pytest.mark.usefixtures("always")
def test_entries_past_the_end_of_a_context_mean_nothing():
    tables = random_tables(5, 7)
    tables[:2] = tables[0]
    assert sharers(plan([128, 300, 50, 50, 50], tables)) == []
    assert sharers(plan([129, 300, 50, 50, 50], tables)) == [([0, 1], 0, 2)]


@pytest.mark.usefixtures("always")
def test_large_groups_are_cut_into_pieces_and_one_row_alone_is_no_piece():
    rows = 2 * PIECE_ROWS + 1
    pieces = sharers(plan_of([200] * rows, [(range(rows), 128)], borders=[128] * rows))
    assert [rows for rows, _, _ in pieces] == [
        list(range(PIECE_ROWS)), list(range(PIECE_ROWS, 2 * PIECE_ROWS))
    ]  # fmt: skip


def test_a_border_past_a_context_is_none():
    lens, tables = [2000] * 6 + [9, 600, 1025], random_tables(9, 32)
    found = plan(lens, tables, borders=[1024] * 9)
    expected = plan(lens, tables, borders=[1024] * 6 + [0, 0, 1024])
    assert all(np.array_equal(*parts) for parts in zip(found[:3], expected[:3]))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("border", [0, 64, 8000 // 64 * 64, 20032])
def test_long_contexts_have_at_most_as_many_chunks_as_there_is_room_for(border: int):
    found = plan_of([20100] * 5, [(range(5), 20032)], borders=[border] * 5)
    assert found.chunk_counts.max() <= MAX_CHUNKS
    assert len(chunks_in(found, TILE)) == found.chunk_counts.sum()


@pytest.mark.usefixtures("always")
def test_work_is_dealt_out_evenly():
    found = plan_of([2000] * 10, [(range(0, 5), 1984), (range(5, 10), 1984)])
    words = found.tiles.ravel()[int(found.list_begin[0]) :]
    bounds = np.array(words[: RANGES + 1])
    records = words[RANGES + 1 : bounds[-1] + 3].reshape(-1, 3)
    loads = np.diff(records[(bounds - RANGES - 1) // 3, 1])
    assert loads.sum() == 2 * 7 * 4 and loads.max() - loads.min() == 0


def test_sharing_too_little_is_no_sharing():
    assert plan_of([200] * 5, [([0, 1], 128)]).list_begin is None
    rows = shared_plan.FEWEST_SPARED_TOKENS // 128
    assert plan_of([200] * rows, [(range(rows), 128)]).list_begin is None  # one row has to be read
    assert plan_of([200] * (rows + 3), [(range(rows + 3), 128)]).list_begin is not None


@pytest.mark.usefixtures("always")
def test_few_rows_never_share_and_have_no_borders():
    found = plan_of([400] * FUSED_ROWS, [(range(FUSED_ROWS), 320)], borders=[320] * FUSED_ROWS)
    assert found.list_begin is None
    without = plan_of([400] * FUSED_ROWS, [(range(FUSED_ROWS), 320)])
    assert all((one == other).all() for one, other in zip(found[:3], without[:3]))


def test_rows_that_begin_otherwise_are_not_looked_at_twice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode_plan, "plan_shared", None)
    assert plan_of([400] * 5, []).list_begin is None
    with pytest.raises(TypeError):
        plan_of([400] * 5, [([1, 3], 64)])


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("rows", [2, 3, 8, 9])
def test_the_list_never_takes_more_room_than_there_is(rows: int):
    """The most there is of it: pairs of rows, each with as many chunks as can be."""
    for length in (65, 129, 193, 257, 449, 8193, 16385):
        lens = [length] * rows
        tables = random_tables(rows, -(-length // BLOCK))
        share_blocks(tables, [(range(i, i + 2), (length - 1) // BLOCK * BLOCK)
                              for i in range(0, rows - 1, 2)], BLOCK)  # fmt: skip
        found = plan(lens, tables, 60, [(length - 1) // BLOCK * BLOCK] * rows)
        words = max_plan_words(rows, length, TILE, BLOCK, RANGES)
        views = decode_plan.DecodePlan.views(np.zeros(words, dtype=np.int32), rows, RANGES, 1, True)
        assert len(found.tiles) <= len(views.tiles)
