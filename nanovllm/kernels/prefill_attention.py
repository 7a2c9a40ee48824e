"""Prefill attention over a paged KV cache.

FlashAttention-style online softmax (Dao 2023, arXiv:2307.08691) in base 2, with keys and values
read tile by tile through the block table; a tile never crosses a KV block. Queries are the last
tokens of their sequence (the rest was cached or computed before), causal.

Grid: (tile of up to 64 queries, query head) as one number, see `prefill_plan`. Tiles of keys that
every query sees come first and need no mask. Bound by arithmetic: 4 * head_dim operations a query,
key and head. Long prompts have a kernel of their own on Hopper, `prefill_hopper`.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.launch import (
    Gpu,
    gpu_with,
    launch_dependents,
    next_power_of_2,
    pdl,
    wait,
)
from nanovllm.kernels.paged_cache import LOG2_E, dot_type, tile_tokens
from nanovllm.kernels.prefill_plan import SHORT_TILE, WORDS, PrefillPlan

# Versions of Triton that `prefill_hopper` was compiled with: Gluon, its language, still changes.
_HAS_GLUON = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)
_MIN_TOKENS, _MIN_SEQLEN = 2048, 256  # of a step and of its longest row
_COPIED_TOKENS = 64  # at once, from one block
_HEAD_DIMS = 64, 128


def paged_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: PrefillPlan,
    block_tables: torch.Tensor,
    scale: float,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of ragged prompts, each query to all tokens of its sequence up to itself.

    Args:
        q: [tokens, num_heads, head_dim], the sequences' new tokens one after the other.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], new tokens stored.
        plan: of the sequences and their tokens.
        block_tables: [sequences, width] int32.
        scale: applied to the scores, usually head_dim ** -0.5.
        kv_scales: [2, num_kv_heads] float32, of keys and values, for a cache in fp8.

    Returns:
        Like `q`.
    """
    if kv_scales is None and suits_hopper(q.shape, q.dtype, k_cache, plan, gpu_with(q)):
        from nanovllm.kernels.prefill_hopper import prefill_on_hopper

        return prefill_on_hopper(q, k_cache, v_cache, plan, block_tables, scale)
    out = torch.empty_like(q)
    _, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    wide = q.element_size() == 2
    stages = 3 if head_dim <= 128 else 2
    _prefill_kernel[(num_heads * len(plan.tiles),)](
        q, k_cache, v_cache, out, plan.tiles, block_tables,
        scale * LOG2_E, kv_scales, block_tables.stride(0), block_size,
        num_heads, num_kv_heads, head_dim, WORDS, DTYPE=dot_type(q.dtype, k_cache),
        BLOCK_D=next_power_of_2(head_dim), BLOCK_M=plan.tile,
        BLOCK_N=tile_tokens(block_size, head_dim, 64 if wide else 16),
        PRECISION="tf32" if wide else "ieee",
        num_warps=4 if wide or plan.tile == SHORT_TILE else 8, num_stages=stages if wide else 1,
        **pdl(q),
    )  # fmt: skip
    return out


def suits_hopper(
    q_shape: torch.Size,
    dtype: torch.dtype,
    k_cache: torch.Tensor,
    plan: PrefillPlan,
    gpu: Gpu | None,
) -> bool:
    """Whether `prefill_hopper` computes this, and sooner. Its launch takes the host 0.08 ms, and a
    tile's beginning takes long."""
    if gpu is None or not gpu.is_hopper or not _HAS_GLUON:
        return False
    (tokens, num_heads, head_dim), (_, block_size, num_kv_heads, _) = q_shape, k_cache.shape
    fits = dtype.itemsize == 2 and k_cache.dtype == dtype and head_dim in _HEAD_DIMS
    in_pairs = num_heads // num_kv_heads % 2 == 0 and block_size % _COPIED_TOKENS == 0
    is_long = tokens >= _MIN_TOKENS and plan.max_seqlen_q >= _MIN_SEQLEN
    return fits and in_pairs and is_long


@triton.jit(do_not_specialize=["table_stride"])
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, tiles_ptr, block_tables_ptr,
    scale_log2, kv_scales_ptr, table_stride, block_size: tl.constexpr, num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr, head_dim: tl.constexpr, WORDS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    head = tl.program_id(0) % num_heads
    tiles_ptr += tl.program_id(0) // num_heads * WORDS
    first_query, num_queries = tl.load(tiles_ptr), tl.load(tiles_ptr + 1)
    first_position, seq = tl.load(tiles_ptr + 2), tl.load(tiles_ptr + 3)
    context_len = tl.load(tiles_ptr + 4)
    wait(PDL)
    if num_queries > 0:
        rows = tl.arange(0, BLOCK_M)
        dims = tl.arange(0, BLOCK_D)
        offsets = ((first_query + rows).to(tl.int64) * num_heads + head) * head_dim
        q_mask = (rows < num_queries)[:, None] & (dims < head_dim)[None, :]
        q = tl.load(q_ptr + offsets[:, None] + dims[None, :], mask=q_mask, other=0.0).to(DTYPE)
        positions = first_position + rows
        kv_head = head // (num_heads // num_kv_heads)
        if kv_scales_ptr is not None:
            scale_log2 *= tl.load(kv_scales_ptr + kv_head)
        k_ptr += kv_head * head_dim
        v_ptr += kv_head * head_dim
        block_tables_ptr += seq.to(tl.int64) * table_stride

        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        all_see = (first_position + 1) // BLOCK_N * BLOCK_N  # keys before it
        some_see = first_position + num_queries
        m, l, acc = _attend(
            q, k_ptr, v_ptr, block_tables_ptr, 0, all_see, positions, context_len, scale_log2,
            m, l, acc, block_size, num_kv_heads * head_dim, head_dim,
            False, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
        m, l, acc = _attend(
            q, k_ptr, v_ptr, block_tables_ptr, all_see, some_see, positions, context_len,
            scale_log2, m, l, acc, block_size, num_kv_heads * head_dim, head_dim,
            True, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
        if kv_scales_ptr is not None:
            acc *= tl.load(kv_scales_ptr + num_kv_heads + kv_head)
        out = (acc / l[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets[:, None] + dims[None, :], out, mask=q_mask)


@triton.jit
def _attend(
    q, k_ptr, v_ptr, block_table_ptr, first, end, positions, context_len, scale_log2,
    m, l, acc, block_size: tl.constexpr, token_stride: tl.constexpr,
    head_dim: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the keys and values of tokens `first` to `end` into (max, sum, weighted values)."""
    lanes = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    if first < end:
        block = tl.load(block_table_ptr + first // block_size).to(tl.int64)
        for start in range(first, end, BLOCK_N):
            # Loaded a tile ahead: an address that depends on a load just made stalls the pipeline.
            following = tl.minimum(start + BLOCK_N, end - 1)
            next_block = tl.load(block_table_ptr + following // block_size).to(tl.int64)
            slots = block * block_size + start % block_size + lanes
            cells = slots[:, None] * token_stride + dims[None, :]
            if MASKED:
                mask = (start + lanes < context_len)[:, None] & (dims < head_dim)[None, :]
                k_tile = tl.load(k_ptr + cells, mask=mask, other=0.0)
                v_tile = tl.load(v_ptr + cells, mask=mask, other=0.0)
            elif head_dim == BLOCK_D:
                k_tile = tl.load(k_ptr + cells)
                v_tile = tl.load(v_ptr + cells)
            else:
                k_tile = tl.load(k_ptr + cells, mask=(dims < head_dim)[None, :], other=0.0)
                v_tile = tl.load(v_ptr + cells, mask=(dims < head_dim)[None, :], other=0.0)
            k_tile, v_tile = k_tile.to(q.dtype), v_tile.to(q.dtype)
            scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
            if MASKED:
                visible = (start + lanes)[None, :] <= positions[:, None]
                scores = tl.where(visible, scores, float("-inf"))
            m_new = tl.maximum(m, tl.max(scores, axis=1))
            weights = tl.exp2(scores - m_new[:, None])
            alpha = tl.exp2(m - m_new)
            l = l * alpha + tl.sum(weights, axis=1)
            acc = acc * alpha[:, None]
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
            m = m_new
            block = next_block
    return m, l, acc
