"""Which rows of a decode step are taken from the step before; see also `test_step_inputs`."""

import numpy as np

from nanovllm import SamplingParams
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_rows import DecodeRows

BLOCK = 16


def sequence(seed: int, block_table: list[int]) -> Sequence:
    seq = Sequence(seed, [1, 2, 3], SamplingParams(max_tokens=500), 600, seed)
    seq.block_table = block_table
    return seq


def update(rows: DecodeRows, *pairs: tuple[Sequence, int]) -> None:
    """To a step of sequences that run the tokens of some numbers."""
    seqs, starts = [seq for seq, _ in pairs], [start for _, start in pairs]
    rows.update(Batch(False, seqs, starts, [1] * len(seqs), [True] * len(seqs)))
    assert rows.rows["seed"].tolist() == [seq.seed for seq in seqs]
    assert rows.rows["start"].tolist() == starts
    for seq, table in zip(seqs, rows.tables.tolist(), strict=True):
        assert table[: len(seq.block_table)] == seq.block_table
    expected = [seq.block_table[n // BLOCK] * BLOCK + n % BLOCK for seq, n in pairs]
    assert rows.slots().tolist() == expected


def test_rows_that_go_on_are_not_written_again():
    rows, a, b = DecodeRows(4, BLOCK), sequence(1, [3, 4]), sequence(2, [5])
    update(rows, (a, 20), (b, 7))
    rows.rows["temperature"] = 0.25
    update(rows, (a, 21), (b, 8))
    assert rows.goes_on and rows.places.tolist() == [0, 1]
    update(rows, (b, 9))
    assert not rows.goes_on and rows.places.tolist() == [1]
    update(rows, (b, 10))
    assert rows.goes_on and rows.places.tolist() == [0]
    assert rows.rows["temperature"].tolist() == [0.25]


def test_a_row_that_begins_a_block_gets_it():
    rows, a, b = DecodeRows(4, BLOCK), sequence(1, [3, 4]), sequence(2, [5])
    update(rows, (a, 20), (b, 15))
    b.block_table.append(9)
    update(rows, (a, 21), (b, 16))
    assert not rows.goes_on
    update(rows, (a, 22), (b, 17))
    assert rows.goes_on


def test_who_was_preempted_between_two_decode_steps_has_other_blocks():
    rows, a = DecodeRows(4, BLOCK), sequence(1, [3, 4])
    update(rows, (a, 20))
    a.block_table = [7, 8]
    update(rows, (a, 22))  # its prefill has run a token more
    assert not rows.goes_on


def test_who_was_preempted_for_want_of_a_block_has_all_blocks_written_when_it_begins_one():
    """All its tokens but the newest fitted into a prefill step: so it runs the next one here."""
    rows, a = DecodeRows(4, BLOCK), sequence(1, [3, 4])
    update(rows, (a, 31))
    a.block_table = [7, 8, 9]
    update(rows, (a, 32))
    assert not rows.goes_on


def test_a_new_row_takes_nothing_from_the_last_one():
    rows, a, b = DecodeRows(1, BLOCK), sequence(1, [3, 4]), sequence(2, [5, 6])
    update(rows, (a, 20))
    update(rows, (b, 21))
    assert rows.places.tolist() == [-1]


def test_nothing_is_kept_that_was_to_be_forgotten():
    rows, a = DecodeRows(4, BLOCK), sequence(1, [3, 4])
    update(rows, (a, 20))
    rows.forget()
    a.block_table = [7, 8]
    update(rows, (a, 21))
    assert not rows.goes_on and rows.places.tolist() == [-1]


def test_what_holds_for_all_rows_is_known_anew_when_they_change():
    rows, plain = DecodeRows(4, BLOCK), sequence(1, [3, 4])
    params = SamplingParams(max_tokens=500, top_k=5, n=2)
    sibling = Sequence(2, [1] * 20, params, 600, seed=2)
    sibling.block_table = [5, 6]
    update(rows, (plain, 20), (sibling, 20))
    assert rows.truncates and np.array_equal(rows.borders, [0, 16])
    update(rows, (plain, 21))
    assert not rows.truncates and rows.borders is None
