"""Partial results of attention, of the chunks of a row, merged.

Each is a sum of values by their weights, with the largest score in base 2 and the sum of weights:
what an online softmax keeps (Dao 2023, arXiv:2307.08691).

Grid: (sequence, query heads). Bytes moved: partial results read, 4 * head_dim a row, head and
chunk. Bound by latency.
"""

import math

import torch
import triton
import triton.language as tl

from nanovllm.kernels.decode_plan import MANY_ROWS
from nanovllm.kernels.launch import (
    launch_dependents,
    next_power_of_2,
    pdl,
    prefer_shared_memory,
    wait,
)


def combine(
    partial: torch.Tensor,
    stats: torch.Tensor,
    chunk_counts: torch.Tensor,
    out: torch.Tensor,
    has_all: bool,
) -> None:
    """Merge the partial results of each row and head.

    Args:
        partial: [rows, num_heads, chunks, head_dim] float32, sums of values by their weights.
        stats: [2, rows, num_heads, chunks] float32, the largest score in base 2 and the sum of
            weights.
        chunk_counts: [rows] int32, how many there are; of none the result is zero.
        out: [rows, num_heads, head_dim], the result.
        has_all: there are partial results of every row; if not, `out` has the result of those of
            one chunk already.
    """
    rows, num_heads, max_chunks, head_dim = partial.shape
    block_d = next_power_of_2(head_dim)
    inputs = partial, stats[0], stats[1], out, chunk_counts
    kernel: object
    if rows > 2 * MANY_ROWS and not has_all:
        heads = math.gcd(num_heads, 8)
        kernel = _combine_heads_kernel[(rows, num_heads // heads)](
            *inputs, head_dim, MAX_CHUNKS=max_chunks, HEADS=heads, BLOCK_C=2, BLOCK_D=block_d,
            num_warps=2, **pdl(out),
        )  # fmt: skip
    else:
        kernel = _combine_kernel[(rows, num_heads)](
            *inputs, head_dim, MAX_CHUNKS=max_chunks, BLOCK_C=8, BLOCK_D=block_d, HAS_ALL=has_all,
            num_warps=1, **pdl(out),
        )  # fmt: skip
    prefer_shared_memory(kernel)


@triton.jit
def _combine_kernel(
    partial_ptr, m_ptr, l_ptr, out_ptr, chunk_counts_ptr, head_dim,
    MAX_CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, HAS_ALL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    row = tl.program_id(0)
    head = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    num_chunks = tl.load(chunk_counts_ptr + row)
    wait(PDL)
    if not HAS_ALL and num_chunks == 1:
        return  # attention has written the result itself
    m = tl.full([], float("-inf"), tl.float32)
    l = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_chunks, BLOCK_C):
        chunk = start + tl.arange(0, BLOCK_C)
        mask = chunk < num_chunks
        place = head * MAX_CHUNKS + chunk
        m_chunk = tl.load(m_ptr + place, mask=mask, other=float("-inf"))
        l_chunk = tl.load(l_ptr + place, mask=mask, other=0.0)
        cell_mask = mask[:, None] & (dims < head_dim)[None, :]
        cells = place[:, None] * head_dim + dims[None, :]
        partial = tl.load(partial_ptr + cells, mask=cell_mask, other=0.0)
        m_new = tl.maximum(m, tl.max(m_chunk, axis=0))
        weight = tl.exp2(m_chunk - m_new)
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(l_chunk * weight, axis=0)
        acc = acc * alpha + tl.sum(partial * weight[:, None], axis=0)
        m = m_new
    out = (acc / tl.maximum(l, 1e-30)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + head * head_dim + dims, out, mask=dims < head_dim)


@triton.jit
def _combine_heads_kernel(
    partial_ptr, m_ptr, l_ptr, out_ptr, chunk_counts_ptr, head_dim: tl.constexpr,
    MAX_CHUNKS: tl.constexpr, HEADS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The same for several heads. In large batches most rows are of one chunk, and programs that
    find nothing to do take time: at 512 rows of 70 tokens 8 of 60 us a layer. In small batches,
    with one head a program, this kernel is slower than the other by 0.15 us."""
    launch_dependents(PDL)
    row = tl.program_id(0)
    first = (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * HEADS
    m_ptr += first * MAX_CHUNKS
    l_ptr += first * MAX_CHUNKS
    partial_ptr += first * MAX_CHUNKS * head_dim
    out_ptr += first * head_dim
    head = tl.arange(0, HEADS)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    dim_mask = dims < head_dim
    num_chunks = tl.load(chunk_counts_ptr + row)
    wait(PDL)
    if num_chunks == 1:
        return  # attention has written the result itself
    m = tl.full([HEADS], float("-inf"), tl.float32)
    l = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, BLOCK_D], tl.float32)
    for start in range(0, num_chunks, BLOCK_C):
        chunk = start + tl.arange(0, BLOCK_C)[None, :]
        mask = chunk < num_chunks
        place = head * MAX_CHUNKS + chunk
        m_chunk = tl.load(m_ptr + place, mask=mask, other=float("-inf"))
        l_chunk = tl.load(l_ptr + place, mask=mask, other=0.0)
        cell_mask = mask[:, :, None] & dim_mask[:, None, :]
        cells = place[:, :, None] * head_dim + dims[:, None, :]
        partial = tl.load(partial_ptr + cells, mask=cell_mask, other=0.0)
        m_new = tl.maximum(m, tl.max(m_chunk, axis=1))
        weight = tl.exp2(m_chunk - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(l_chunk * weight, axis=1)
        acc = acc * alpha[:, None] + tl.sum(partial * weight[:, :, None], axis=1)
        m = m_new
    out = (acc / tl.maximum(l, 1e-30)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + head * head_dim + dims, out, mask=dim_mask)
