"""Changes of the logits before sampling: biases, penalties, and tokens that may not come.

    x += bias of the row's slot
    x = x / r if x > 0 else x * r     for tokens of the prompt or generated; r: repetition penalty
    x -= frequency * times + presence  for tokens generated so many times
    x = -inf                           for tokens that the row's mask leaves out

In a decode step the token that came last is counted first. It is the row's input, known to the
device alone, so a program that has it among its tokens is the one that counts it.

Grid: (row, block of 4096 tokens). Bytes moved: the logits read, and written in float32; where a row
has a slot with penalties 2 bytes a token more, with biases 4. Bound by memory.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl

from nanovllm.kernels.launch import cdiv, launch_dependents, pdl, wait

_BLOCK = 4096


class Tables(Protocol):
    """See `layers.edit_tables.EditTables`."""

    first_token: int
    options: torch.Tensor
    seen: torch.Tensor
    bias: torch.Tensor
    masks: torch.Tensor


def edit_logits(
    logits: torch.Tensor,
    slots: torch.Tensor,
    newest: torch.Tensor | None,
    sampled: torch.Tensor,
    mask_places: torch.Tensor | None,
    tables: Tables,
    out: torch.Tensor,
) -> None:
    """Logits as they are to be sampled from, into `out` [rows, vocab] float32.

    Args:
        logits: [rows, vocab], any float dtype; of the tokens from `tables.first_token` on.
        slots: [rows] int32; -1 for rows that change nothing.
        newest: [rows] int32, the tokens to be counted first; -1 - i stands for `sampled[i]`.
        sampled: [rows or more] int64.
        mask_places: [rows] int32, each row's place among the masks; -1 for rows that have none.
            Only rows with a slot have one.
    """
    rows, vocab = logits.shape
    _edit_kernel[(rows, cdiv(vocab, _BLOCK))](
        logits, slots, newest, sampled, mask_places, tables.options, tables.seen, tables.bias,
        tables.masks, out, vocab, tables.masks.shape[1], FIRST=tables.first_token,
        HAS_NEWEST=newest is not None, HAS_MASKS=mask_places is not None, BLOCK=_BLOCK,
        num_warps=8, **pdl(logits),
    )  # fmt: skip


@triton.jit
def _edit_kernel(
    logits_ptr, slots_ptr, newest_ptr, sampled_ptr, mask_places_ptr, options_ptr, seen_ptr,
    bias_ptr, masks_ptr, out_ptr, vocab, num_words, FIRST: tl.constexpr, HAS_NEWEST: tl.constexpr,
    HAS_MASKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = FIRST + place
    inside = place < vocab
    x = tl.load(logits_ptr + row * vocab + place, mask=inside, other=0.0).to(tl.float32)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot >= 0:
        options_ptr += slot * 4
        at = slot * vocab + place
        if tl.load(options_ptr + 3) != 0:
            x += tl.load(bias_ptr + at, mask=inside, other=0.0)
        repetition, presence = tl.load(options_ptr), tl.load(options_ptr + 1)
        frequency = tl.load(options_ptr + 2)
        if (repetition != 1) | (presence != 0) | (frequency != 0):
            seen = tl.load(seen_ptr + at, mask=inside, other=0).to(tl.int32)
            if HAS_NEWEST:
                newest = tl.load(newest_ptr + row).to(tl.int64)
                if newest < 0:
                    newest = tl.load(sampled_ptr - 1 - newest)
                is_newest = inside & (token == newest) & ((seen & 0x7FFF) < 0x7FFF)
                seen += is_newest.to(tl.int32)
                tl.store(seen_ptr + at, seen.to(tl.int16), mask=is_newest)
            times = (seen & 0x7FFF).to(tl.float32)
            repeated = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
            x = tl.where(seen != 0, repeated, x)
            x -= times * frequency + tl.where(times > 0, presence, 0.0)
        if HAS_MASKS:
            mask_place = tl.load(mask_places_ptr + row).to(tl.int64)
            if mask_place >= 0:
                words_ptr = masks_ptr + mask_place * num_words + (token >> 5)
                words = tl.load(words_ptr, mask=inside, other=0)
                x = tl.where(((words >> (token & 31)) & 1) != 0, x, float("-inf"))
    tl.store(out_ptr + row * vocab + place, x, mask=inside)
