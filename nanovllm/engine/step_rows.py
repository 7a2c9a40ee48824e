"""What a step has to know of its rows, in arrays; in decode, kept from one step to the next."""

import numpy as np

from nanovllm.engine.scheduler import Batch
from nanovllm.engine.sequence import Sequence

ROW = np.dtype([
    ("start", np.int64),  # the first of its tokens that runs
    ("border", np.int64),  # tokens in full blocks that others of its request have, too
    ("seed", np.int64), ("temperature", np.float32),
    ("truncates", np.bool_), ("top_k", np.int32), ("top_p", np.float32), ("min_p", np.float32),
])  # fmt: skip
_NEVER = -2  # no row starts at the token after this one


def row_of(seq: Sequence, start: int, block_size: int) -> tuple[float, ...]:
    """A row, as `ROW` has it."""
    one = seq.sampling
    border = seq.num_prompt_tokens // block_size * block_size if seq.has_siblings else 0
    return (
        start, border, seq.seed, one.temperature, one.truncates, one.top_k, one.top_p, one.min_p
    )  # fmt: skip


class DecodeRows:
    """The rows of the newest decode step.

    Most of them are those of the decode step before, each a token further on: then only the block
    tables of rows that begin a block change. Where sequences have ended or come, the others move. A
    row is kept only if it ran in the step before, and there the token before.

    A sequence that was preempted meanwhile has other blocks, and its whole table is written again:
    either it has run more tokens since, and counts as new; or it begins a block, since it was
    preempted for want of one.

    Args:
        max_rows: of a step.
        block_size: tokens of a KV block.

    Attributes:
        seq_ids: of each row. The sequences themselves are not kept: they may end.
        rows: [rows] of `ROW`.
        tables: [rows, width] int32; past the end of a row's table lie entries of older ones. No
            wider than was needed so far, to fit the processor's cache.
        places: [rows], where each was in the decode step before; -1: it was not.
        goes_on: whether all is as it was, but each row a token further in the same block.
        truncates: whether any row does.
        borders: [rows]; None if all are 0.
    """

    seq_ids: list[int]
    rows: np.ndarray
    tables: np.ndarray
    places: np.ndarray
    borders: np.ndarray | None

    def __init__(self, max_rows: int, block_size: int) -> None:
        self.block_size = block_size
        self._all_places = np.arange(max_rows)
        self._all_rows = np.zeros(max_rows, ROW)
        self._all_tables = np.zeros((max_rows, 1), dtype=np.int32)
        self.forget()

    def forget(self) -> None:
        """Keep nothing for the next step."""
        self._take([])
        self.goes_on, self.truncates, self.borders = False, False, None

    def update(self, batch: Batch) -> None:
        """Go on to the next decode step."""
        seqs = batch.seqs
        starts = np.fromiter(batch.starts, np.int64, len(seqs))
        seq_ids = [seq.seq_id for seq in seqs]
        stay = seq_ids == self.seq_ids
        if stay:
            self.places = self._all_places[: len(seqs)]
        else:
            self._move(seq_ids)
        is_new = self.rows["start"] != starts - 1
        self.rows["start"] = starts
        begin_blocks = starts % self.block_size == 0
        changed = np.flatnonzero(is_new | begin_blocks).tolist()
        if changed:
            self._write_tables({row: seqs[row].block_table for row in changed})
        self.goes_on = stay and not changed
        if not stay or is_new.any():
            for row in np.flatnonzero(is_new).tolist():
                self.rows[row] = row_of(seqs[row], batch.starts[row], self.block_size)
            self.truncates = bool(self.rows["truncates"].any())
            borders = self.rows["border"].copy()
            self.borders = borders if borders.any() else None

    def slots(self) -> np.ndarray:
        """[rows], where in the cache the tokens that run are stored."""
        starts = self.rows["start"]
        blocks = starts // self.block_size
        return self.tables[self._all_places[: len(starts)], blocks] * self.block_size + (
            starts - blocks * self.block_size
        )

    def _move(self, seq_ids: list[int]) -> None:
        rows, place_of = len(seq_ids), dict(zip(self.seq_ids, range(len(self.seq_ids))))
        places = np.fromiter((place_of.get(seq_id, -1) for seq_id in seq_ids), np.int64, rows)
        self._all_rows[:rows] = self._all_rows.take(places)
        self._all_tables[:rows] = self._all_tables.take(places, axis=0)
        self._take(seq_ids)
        self.rows["start"][places < 0] = _NEVER
        self.places = places

    def _write_tables(self, tables: dict[int, list[int]]) -> None:
        missing = max(map(len, tables.values())) - self.tables.shape[1]
        if missing > 0:
            self._all_tables = np.pad(self._all_tables, ((0, 0), (0, missing)))
            self._take(self.seq_ids)
        for row, table in tables.items():
            self.tables[row, : len(table)] = table

    def _take(self, seq_ids: list[int]) -> None:
        self.seq_ids, rows = seq_ids, len(seq_ids)
        self.rows, self.tables = self._all_rows[:rows], self._all_tables[:rows]
