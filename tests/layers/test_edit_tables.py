"""Changes of the logits, row by row, against formulas written out here."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from nanovllm import SamplingParams
from nanovllm.engine.logit_edits import LogitEdits
from nanovllm.layers.edit_tables import MOST_TIMES, EditTables, RowEdits, SlotContents

CPU = torch.device("cpu")
VOCAB = 10
ENDING = frozenset([8, 9])
INF = math.inf


def contents(slot: int, prompt: list[int], generated: list[int], **options: Any) -> SlotContents:
    edits = LogitEdits.of(SamplingParams(**options), ENDING)
    assert edits is not None
    return edits.contents(slot, prompt, generated, len(generated))


def logits_of(rows: int) -> torch.Tensor:
    """-4 to 5 in each row, so that tokens 0 to 3 are below 0 and token 4 is at it."""
    return torch.arange(-4.0, 6.0).repeat(rows, 1)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def edited(tables: EditTables, slots: list[int], newest: list[int] | None = None) -> torch.Tensor:
    edits = RowEdits(int32(*slots), None if newest is None else int32(*newest), None)
    return tables.edited(logits_of(len(slots)), edits, torch.tensor([3, 7])).clone()


def write_masks(tables: EditTables, masks: np.ndarray) -> None:
    tables.host_masks(len(masks))[:] = masks
    tables.send_masks(len(masks))


@pytest.mark.parametrize("newest_is_counted", [True, False])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"allowed_token_ids": [0, 7]}, [-4] + [-INF] * 6 + [3] + [-INF] * 2),
        ({"min_tokens": 4}, [-4, -3, -2, -1, 0, 1, 2, 3, -INF, -INF]),
        ({"min_tokens": 3, "logit_bias": {1: 1}}, [-4, -2, -2, -1, 0, 1, 2, 3, 4, 5]),
        ({"logit_bias": {0: 2.5, 9: -1000}}, [-1.5, -3, -2, -1, 0, 1, 2, 3, 4, -95]),
        ({"presence_penalty": 0.5}, [-4, -3, -2.5, -1, 0, 1, 2, 2.5, 4, 5]),
        ({"frequency_penalty": 0.5}, [-4, -3, -2.5, -1, 0, 1, 2, 2, 4, 5]),
        ({"repetition_penalty": 2.0}, [-4, -6, -4, -1, 0, 1, 1, 1.5, 4, 5]),
        # Everything at once: bias, then division or multiplication, then what is taken off.
        (
            {
                "logit_bias": {2: 4.0, 6: -3}, "repetition_penalty": 2.0,
                "presence_penalty": 1, "frequency_penalty": 0.25,
                "allowed_token_ids": [1, 2, 6, 7, 9], "min_tokens": 4,
            },
            [-INF, -6, 1 - 1.25, -INF, -INF, -INF, -2, 1.5 - 1.5, -INF, -INF],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_each_option_does_to_a_row(
    options: dict[str, Any], expected: list[float], newest_is_counted: bool
):
    """After the prompt 1, 6, 6 came 7, 2, 7; the last 7 was sampled by the step before."""
    tables = EditTables(2, CPU, VOCAB)
    if newest_is_counted:
        tables.write([contents(1, [1, 6, 6], [7, 2, 7], **options)])
        found = edited(tables, [1])
    else:
        edits = LogitEdits.of(SamplingParams(**options), ENDING)
        assert edits is not None
        tables.write([edits.contents(1, [1, 6, 6], [7, 2], num_generated=3)])
        found = edited(tables, [1], newest=[-2])
    assert found[0].tolist() == pytest.approx(expected)


def test_tokens_are_counted_step_by_step_by_the_slots_that_run():
    tables = EditTables(3, CPU, VOCAB)
    for slot in range(3):
        tables.write([contents(slot, [], [], frequency_penalty=1)])
    edited(tables, [2, -1, 0], newest=[5, 5, -1])  # -1: token 3
    edited(tables, [0, 2], newest=[-2, 5])  # -2: token 7
    expected = np.zeros((3, VOCAB), dtype=np.int16)
    expected[2, 5], expected[0, 3], expected[0, 7] = 2, 1, 1
    assert np.array_equal(tables.seen, expected)
    assert torch.equal(edited(tables, [2])[0], logits_of(1)[0] - torch.tensor(expected[2]))
    assert np.array_equal(tables.seen, expected), "a step without new tokens counts none"


def test_a_token_that_was_generated_most_often_stays_at_that():
    tables = EditTables(1, CPU, VOCAB)
    history = [4] * (MOST_TIMES + 5)
    tables.write([contents(0, [4], history, frequency_penalty=0.5, repetition_penalty=3)])
    for _ in range(2):
        assert edited(tables, [0], newest=[4])[0, 4] == -0.5 * MOST_TIMES


def test_a_slot_holds_nothing_of_who_had_it_before():
    tables = EditTables(2, CPU, VOCAB)
    everything = {
        "logit_bias": {3: 1.0}, "allowed_token_ids": [1, 3], "presence_penalty": 1,
        "repetition_penalty": 2, "min_tokens": 9,
    }  # fmt: skip
    tables.write([contents(0, [1], [2, 3], **everything)])
    tables.write([contents(0, [5], [6], frequency_penalty=1)])
    expected = logits_of(1)
    expected[0, 6] -= 1
    assert torch.equal(edited(tables, [0]), expected)
    tables.write([contents(0, [5], [6], logit_bias={0: 1})])
    expected = logits_of(1)
    expected[0, 0] += 1
    assert torch.equal(edited(tables, [0]), expected)


def test_rows_with_other_wishes_do_not_meet():
    wishes: list[dict[str, Any]] = [
        {"repetition_penalty": 1.5, "presence_penalty": 1}, {"logit_bias": {3: 7.0}},
        {"allowed_token_ids": [2, 3]}, {"frequency_penalty": 2}, {"min_tokens": 9},
    ]  # fmt: skip
    histories = [([1, 2], [3]), ([4], [5, 5]), ([6], []), ([7], [7, 7, 8]), ([0], [9])]
    pairs = list(zip(histories, wishes, strict=True))
    tables = EditTables(6, CPU, VOCAB)
    tables.write([contents(i, *history, **options) for i, (history, options) in enumerate(pairs)])
    together = edited(tables, [4, 3, -1, 2, 1, 0])
    for row, slot in ((0, 4), (1, 3), (3, 2), (4, 1), (5, 0)):
        alone = EditTables(1, CPU, VOCAB)
        history, options = pairs[slot]
        alone.write([contents(0, *history, **options)])
        assert torch.equal(together[row], edited(alone, [0])[0])
    assert torch.equal(together[2], logits_of(1)[0])


def test_each_part_of_the_vocabulary_has_its_part_of_everything():
    """Two ranks, of tokens 0 to 5 and 6 to 9."""
    options: dict[str, Any] = {
        "logit_bias": {2: 4.0, 6: -3}, "repetition_penalty": 2.0, "frequency_penalty": 0.25,
        "allowed_token_ids": [1, 2, 6, 7, 9],
    }  # fmt: skip
    masks = np.array([[~(1 << 6)]], dtype=np.int32)
    found = []
    for part in (slice(0, VOCAB), slice(0, 6), slice(6, 10)):
        tables = EditTables(2, CPU, part.stop - part.start, part.start, VOCAB)
        tables.write([contents(1, [1, 6, 6], [7, 2], **options)])
        write_masks(tables, masks)
        for _ in range(2):
            edits = RowEdits(int32(1), int32(7), int32(0))
            own = tables.edited(logits_of(1)[:, part], edits, torch.tensor([0])).clone()
        found.append(own)
    assert torch.equal(torch.cat(found[1:], dim=1), found[0])
    assert found[0][0, 7] == 1.5 - 0.75 and found[0][0, 6] == -INF, "a mask's bit is off"


@pytest.mark.parametrize("vocab", [31, 32, 70])
def test_masks_leave_the_tokens_whose_bits_are_set(vocab: int):
    rows, words = 4, -(-vocab // 32)
    may_come = torch.rand(rows, 32 * words, generator=torch.Generator().manual_seed(vocab)) < 0.5
    bits = may_come.numpy().reshape(rows, words, 32).astype(np.uint32)
    masks = (bits << np.arange(32, dtype=np.uint32)).sum(axis=2, dtype=np.uint32).view(np.int32)
    tables = EditTables(rows, CPU, vocab)
    tables.write([SlotContents(slot, (1.0, 0.0, 0.0), None, None) for slot in range(rows)])
    write_masks(tables, masks)
    neutral = rows
    edits = RowEdits(int32(2, neutral, -1, neutral), None, int32(1, 3, -1, -1))
    found = tables.edited(torch.zeros(rows, vocab), edits, torch.tensor([0]))
    expected = torch.zeros(rows, vocab)
    expected[0][~may_come[1, :vocab]] = -INF
    expected[1][~may_come[3, :vocab]] = -INF
    assert torch.equal(found, expected)


def test_logits_are_those_of_transformers_processors():
    vocab, rows = 500, 4
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, vocab, generator=generator)
    prompts = torch.randint(vocab, (rows, 30), generator=generator)
    generated = torch.randint(vocab, (rows, 20), generator=generator)
    input_ids = torch.cat([prompts, generated], dim=1)
    processors = [
        transformers.SequenceBiasLogitsProcessor({(7,): 2.5, (11,): -4.0}),
        transformers.MinNewTokensLengthLogitsProcessor(30, 21, [8, 9]),
        transformers.RepetitionPenaltyLogitsProcessor(1.3),
    ]
    expected = logits.clone()
    for processor in processors:
        expected = processor(input_ids, expected)
    tables = EditTables(rows, CPU, vocab)
    options = {"logit_bias": {7: 2.5, 11: -4.0}, "min_tokens": 21, "repetition_penalty": 1.3}
    for row in range(rows):
        # The last token is not counted yet.
        history = prompts[row].tolist(), generated[row, :-1].tolist()
        tables.write([contents(row, *history, **options)])
    edits = RowEdits(int32(*range(rows)), generated[:, -1].int(), None)
    found = tables.edited(logits, edits, torch.tensor([0]))
    assert torch.equal(found, expected)
    assert torch.isneginf(found[:, [8, 9]]).all() and torch.isfinite(found).sum() == rows * 498
