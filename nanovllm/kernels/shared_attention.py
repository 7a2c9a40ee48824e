"""Attention of a decode step to chunks that several rows share: each read once for all of them.

A shared prefix gives a product of matrices where decode attention has one of a vector (Hydragen,
Juravsky et al. 2024, arXiv:2402.05099): the queries of all rows of a piece, times the query heads
of the kv head, are the rows of one tile. What comes of it for each row, head and chunk is the
partial result that `kernels.decode_attention` would have got, with the same tiles in the same
order, and is merged by that file's combine kernel. A row's chunks, and how they are merged, do not
depend on who shares them, and the instructions are the same: so is every bit of the result.

Grid: (part, kv head, range). `plan_shared` deals pieces out to ranges; a part is LANES of a piece's
queries. Only a step in which rows share launches it.

Bytes moved: keys and values of a chunk once a part of a piece, but from memory once a chunk: the
others find them in the second-level cache. For each row, head and chunk there is a partial result
of 4 * head_dim bytes. Bound by memory where a part has few rows of its own chunk, and by that cache
and by shared memory where many rows share one.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.decode_plan import MAX_CHUNKS, DecodePlan, decode_tile, num_spans
from nanovllm.kernels.launch import cdiv, launch_dependents, next_power_of_2, pdl, wait
from nanovllm.kernels.paged_cache import LOG2_E, dot_type, load_slots
from nanovllm.kernels.shared_plan import PIECE_ROWS, PIECE_WORDS
from nanovllm.kernels.value_tiles import (
    add_values,
    dims_of_part,
    no_values,
    scaled_values,
    value_words,
)

# Queries of a program. With 64 Hopper's own matrix instructions would serve twice as many queries
# for each tile read, and sum in another order than decode attention.
LANES = 32
# In fp8 a product is a quarter as wide (`value_tiles`): 32 would be laid out in another way than
# decode attention's 16, with sums in another order.
_FP8_LANES = 16


def attend_shared(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: DecodePlan,
    partial: torch.Tensor,
    stats: torch.Tensor,
    scale: float,
    kv_scales: torch.Tensor | None = None,
) -> None:
    """Partial results of the chunks that are in the plan's list of shared ones.

    Args:
        q: [rows, num_heads, head_dim], normalised and rotated.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim].
        plan: with such a list, on the device.
        partial: [rows, num_heads, MAX_CHUNKS, head_dim] float32, sums of values by their weights.
        stats: [2, rows, num_heads, MAX_CHUNKS] float32, the largest score in base 2 and the sum of
            weights.
        scale, kv_scales: as in `paged_decode`.
    """
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    group = q.shape[1] // num_kv_heads
    wide = q.element_size() == 2
    lanes = LANES if kv_scales is None else _FP8_LANES
    parts = cdiv(PIECE_ROWS * group, lanes)
    values, value_parts = value_words(v_cache)
    tile = decode_tile(len(q), head_dim, in_fp8=kv_scales is not None)
    grid = (parts, num_kv_heads, plan.bounds.shape[0] - 1)
    _shared_kernel[grid](
        q, k_cache, values, plan.list_begin, plan.tiles, partial, stats[0], stats[1],
        scale * LOG2_E, kv_scales, num_kv_heads, head_dim, DTYPE=dot_type(q.dtype, k_cache),
        GROUP=group, LANES=lanes, BLOCK_D=next_power_of_2(head_dim),
        BLOCK_N=tile, SPANS=num_spans(tile, block_size),
        PARTS=value_parts, MAX_CHUNKS=MAX_CHUNKS, PIECE_WORDS=PIECE_WORDS,
        PRECISION="tf32" if wide else "ieee", num_warps=4 if wide else 8,
        num_stages=3 if wide else 1, **pdl(q),
    )  # fmt: skip


@triton.jit
def _shared_kernel(
    q_ptr, k_ptr, values_ptr, list_begin_ptr, words_ptr, partial_ptr, m_ptr, l_ptr, scale_log2,
    kv_scales_ptr, num_kv_heads: tl.constexpr, head_dim: tl.constexpr, DTYPE: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SPANS: tl.constexpr, PARTS: tl.constexpr, MAX_CHUNKS: tl.constexpr, PIECE_WORDS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    kv_head = tl.program_id(1)
    words_ptr += tl.load(list_begin_ptr)
    first_piece = tl.load(words_ptr + tl.program_id(2))
    end_piece = tl.load(words_ptr + tl.program_id(2) + 1)
    first_lane = tl.program_id(0) * LANES
    lanes = first_lane + tl.arange(0, LANES)
    dims = tl.arange(0, BLOCK_D)
    dim_mask = (dims < head_dim)[None, :]
    num_heads: tl.constexpr = num_kv_heads * GROUP
    token_stride: tl.constexpr = num_kv_heads * head_dim
    tokens = (tl.arange(0, BLOCK_N) % (BLOCK_N // SPANS))[:, None]  # of a span
    cells = tokens * token_stride + kv_head * head_dim + dims[None, :]
    words = tl.arange(0, BLOCK_D // PARTS)[None, :]
    word_mask = words < head_dim // PARTS
    words = tokens * (token_stride // PARTS) + kv_head * (head_dim // PARTS) + words
    if kv_scales_ptr is not None:
        v_scale = tl.load(kv_scales_ptr + num_kv_heads + kv_head)
        scale_log2 *= tl.load(kv_scales_ptr + kv_head)
    wait(PDL)
    # What is the same for all pieces is not kept: it would cost the registers of the loop within.
    for piece in tl.range(first_piece, end_piece, PIECE_WORDS, disable_licm=True):
        first_row = tl.load(words_ptr + piece)
        num_lanes = (tl.load(words_ptr + piece + PIECE_WORDS) - first_row) * GROUP
        if first_lane < num_lanes:
            first_tile = tl.load(words_ptr + piece + 1)
            end_tile = tl.load(words_ptr + piece + 1 + PIECE_WORDS)
            chunk = tl.load(words_ptr + piece + 2)
            real = lanes < num_lanes
            mask = real[:, None] & dim_mask
            row = tl.load(words_ptr + first_row + lanes // GROUP, mask=real, other=0)
            head = row.to(tl.int64) * num_heads + kv_head * GROUP + lanes % GROUP
            q = tl.load(q_ptr + head[:, None] * head_dim + dims[None, :], mask=mask, other=0.0)
            q = q.to(DTYPE)
            m = tl.full([LANES], float("-inf"), tl.float32)
            l = tl.zeros([LANES, BLOCK_N], tl.float32)  # summed over the tile at the chunk's end
            acc = no_values(LANES, BLOCK_D, PARTS)
            slot = load_slots(words_ptr + first_tile, BLOCK_N, SPANS)
            for tile in range(first_tile, end_tile, SPANS):
                # Loaded a tile ahead, as in decode attention.
                following = words_ptr + tl.minimum(tile + SPANS, end_tile - SPANS)
                next_slot = load_slots(following, BLOCK_N, SPANS)
                start = slot.to(tl.int64) * token_stride
                k_tile = tl.load(k_ptr + start + cells, mask=dim_mask, other=0.0).to(DTYPE)
                v_tile = tl.load(values_ptr + start // PARTS + words, mask=word_mask, other=0.0)
                scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
                # As there, a choice keeps the compiler from fusing this product with the difference
                # below, which would round otherwise.
                scores = tl.where(real[:, None], scores, 0.0)
                m_new = tl.maximum(m, tl.max(scores, axis=1))
                weights = tl.exp2(scores - m_new[:, None])
                alpha = tl.exp2(m - m_new)
                l = l * alpha[:, None] + weights
                acc = scaled_values(acc, alpha[:, None])
                acc = add_values(acc, weights.to(DTYPE), v_tile, DTYPE, PRECISION)
                m = m_new
                slot = next_slot
            if kv_scales_ptr is not None:
                acc = scaled_values(acc, v_scale)
            place = head * MAX_CHUNKS + chunk
            tl.store(m_ptr + place, m, mask=real)
            tl.store(l_ptr + place, tl.sum(l, axis=1), mask=real)
            for part in tl.static_range(PARTS):
                part_dims = dims_of_part(part, BLOCK_D, PARTS)[None, :]
                partials = partial_ptr + place[:, None] * head_dim + part_dims
                tl.store(partials, acc[part], mask=real[:, None] & (part_dims < head_dim))
