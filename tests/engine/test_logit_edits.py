"""Which request has which slot."""

from typing import Any

from nanovllm import SamplingParams
from nanovllm.engine.logit_edits import EditSlots
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.sequence import Sequence, SequenceStatus

VOCAB_ENDS = (90, 91)


def sequence(seq_id: int, **options: Any) -> Sequence:
    params = SamplingParams(max_tokens=50, **options)
    seq = Sequence(seq_id, [1, 2, 3], params, 100, 0, VOCAB_ENDS)
    seq.status = SequenceStatus.RUNNING
    return seq


def batch(*seqs: Sequence, is_prefill: bool = False) -> Batch:
    """Each runs all that is left, in prefill, or its newest token."""
    starts = [0 if is_prefill else len(seq.token_ids) - 1 for seq in seqs]
    lengths = [len(seq.token_ids) - start for seq, start in zip(seqs, starts, strict=True)]
    return Batch(is_prefill, [*seqs], starts, lengths, [True] * len(seqs))


def test_a_request_keeps_its_slot_and_writes_it_once():
    slots, seq = EditSlots(2), sequence(0, frequency_penalty=1)
    found, (contents,) = slots.of_batch(batch(seq, is_prefill=True))
    assert found == {0: contents.slot} and contents.seen is not None
    assert contents.seen[0].tolist() == [1, 2, 3]
    for token in (7, 8):
        seq.token_ids.append(token)
        assert slots.of_batch(batch(seq)) == (found, [])


def test_a_row_that_is_the_last_of_its_request_keeps_its_slot_in_its_step():
    """While the slots of those whose last row was in the step before go to others."""
    slots = EditSlots(2)
    before = [sequence(i, frequency_penalty=1) for i in range(2)]
    slots.of_batch(batch(*before, is_prefill=True))
    now = [sequence(i, frequency_penalty=1) for i in range(2, 4)]
    for seq in (*before, now[0]):
        seq.num_computed_tokens = seq.max_len - 1
    found, contents = slots.of_batch(batch(*now, is_prefill=True))
    assert sorted(found.values()) == [0, 1] and len(contents) == 2


def test_rows_that_change_nothing_have_none():
    slots = EditSlots(2)
    rows = batch(sequence(0), sequence(1, logprobs=1), sequence(2, logit_bias={5: 1.0}))
    found, contents = slots.of_batch(rows)
    assert [*found] == [2] and len(contents) == 1


def test_who_was_preempted_writes_its_slot_anew_with_all_its_tokens():
    slots, seq = EditSlots(2), sequence(0, presence_penalty=1)
    slots.of_batch(batch(seq, is_prefill=True))
    seq.token_ids.extend([7, 7, 2])
    _, (contents,) = slots.of_batch(batch(seq, is_prefill=True))
    tokens, entries = contents.seen
    prompt = -(2**15)
    assert dict(zip(tokens.tolist(), entries.tolist(), strict=True)) == {
        1: prompt, 2: prompt + 1, 3: prompt, 7: 2
    }  # fmt: skip


def test_after_min_tokens_the_slot_is_written_or_given_back():
    slots = EditSlots(2)
    only, biased = sequence(0, min_tokens=2), sequence(1, min_tokens=2, logit_bias={5: 1.0})
    _, contents = slots.of_batch(batch(only, biased, is_prefill=True))
    assert [sorted(one.bias.token_ids.tolist()) for one in contents] == [[90, 91], [5, 90, 91]]
    for seq in (only, biased):
        seq.token_ids.append(7)
    assert slots.of_batch(batch(only, biased))[1] == []
    for seq in (only, biased):
        seq.token_ids.append(7)
    found, (contents,) = slots.of_batch(batch(only, biased))
    assert found == {1: contents.slot} and contents.bias.token_ids.tolist() == [5]
    assert contents.seen is None, "what was counted stays"


def test_slots_of_those_that_have_ended_or_wait_are_given_to_others():
    slots = EditSlots(3)
    seqs = [sequence(i, repetition_penalty=1.1) for i in range(3)]
    first, _ = slots.of_batch(batch(*seqs, is_prefill=True))
    assert sorted(first.values()) == [0, 1, 2]
    seqs[0].status, seqs[2].status = SequenceStatus.FINISHED, SequenceStatus.WAITING
    others = [sequence(i, repetition_penalty=1.1) for i in (3, 4)]
    second, _ = slots.of_batch(batch(*others, is_prefill=True))
    assert sorted([first[1], *second.values()]) == [0, 1, 2]


def test_clearing_brings_back_a_slot_that_an_interrupt_has_lost():
    slots = EditSlots(1)
    slots._free.pop()
    slots.clear()
    assert slots.of_batch(batch(sequence(0, repetition_penalty=2), is_prefill=True))[0] == {0: 0}
