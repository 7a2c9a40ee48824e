"""Changes of the logits: the kernel against its torch twin, which has tests of its own."""

import numpy as np
import pytest
import torch

from helpers.kernel_inputs import interpreted, normal, on_cpu, on_gpu
from nanovllm.kernels.edit_logits import edit_logits
from nanovllm.layers.edit_tables import Bias, EditTables, RowEdits, SlotContents


def contents(slot: int, vocab: int) -> SlotContents:
    rng = np.random.default_rng(slot)
    penalties = [(1.0, 0.0, 0.0), (1.3, 0.0, 0.0), (1.0, -0.5, 1.5), (0.7, 0.3, 0.2)][slot % 4]
    token_ids = rng.choice(vocab, min(50, vocab), replace=False)
    seen = rng.integers(-(2**15), 2**15, len(token_ids)).astype(np.int16)
    seen[0] = 2**15 - 1  # counted no further
    values = rng.normal(size=20).astype(np.float32)
    values[0] = -np.inf
    named = rng.choice(vocab, len(values), replace=False)
    bias = [None, Bias(0.0, named, values), Bias(-np.inf, named, values)][slot % 3]
    return SlotContents(slot, penalties, (token_ids, seen), bias)


def check(vocab: int, part: slice, dtype: torch.dtype, device: str) -> None:
    """Three steps, of which the second and third count the tokens of the ones before."""
    rows = slots = 12
    cpu, own = (
        EditTables(slots, torch.device(where), part.stop - part.start, part.start, vocab)
        for where in ("cpu", device)
    )
    all_contents = [contents(slot, vocab) for slot in range(slots)]
    masks = np.random.default_rng(1).integers(-(2**31), 2**31, (4, cpu.num_words), dtype=np.int32)
    for tables in (cpu, own):
        tables.write(all_contents)
        tables.host_masks(len(masks))[:] = masks
        tables.send_masks(len(masks))
    order = torch.arange(rows, dtype=torch.int32).flip(0)
    order[5] = -1
    mask_places = torch.full((rows,), -1, dtype=torch.int32)
    mask_places[[0, 3, 7, 11]] = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        logits = normal(rows, part.stop - part.start, dtype=dtype, seed=step)
        logits[2, 3] = float("-inf")
        sampled = torch.randint(vocab, (rows,), generator=generator)
        sampled[1] = int(all_contents[10].seen[0][0])  # of which there are as many as can be
        newest = torch.randint(-rows, vocab, (rows,), generator=generator, dtype=torch.int32)
        newest[1] = -2
        edits = RowEdits(order, newest if step else None, mask_places if step == 2 else None)
        expected = cpu.edited(logits, edits, sampled)
        out = torch.full_like(expected, float("nan")).to(device)
        there = [None if one is None else one.to(device) for one in (*edits, sampled)]
        slots_, newest_, places, sampled_ = there
        edit_logits(logits.to(device), slots_, newest_, sampled_, places, own, out)
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(own.seen.cpu(), cpu.seen)


PARTS = [(9000, slice(0, 9000)), (9000, slice(0, 4512)), (9000, slice(4512, 9000))]


@interpreted
@on_cpu
@pytest.mark.parametrize(("vocab", "part"), [*PARTS, (70, slice(0, 70))])
def test_logits_are_changed_as_by_the_twin(vocab: int, part: slice, dtype: torch.dtype) -> None:
    check(vocab, part, dtype, "cpu")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("vocab", "part"), [*PARTS, (151936, slice(0, 151936))])
def test_logits_are_changed_as_by_the_twin_gpu(vocab: int, part: slice, dtype: torch.dtype) -> None:
    check(vocab, part, dtype, "cuda")
