"""Decode attention over a paged KV cache: one query a sequence, to all its tokens so far.

FlashAttention-style online softmax (Dao 2023, arXiv:2307.08691) in base 2. The context is cut into
chunks at fixed places, which depend on its own length (at most 32 chunks of any) and on whether the
batch has up to 4, 64, 128 or more rows: within these classes a row's result does not depend on who
shares its batch, between them it does in the last bits. The query heads that share a kv head go
together, padded to the 16 rows of a matrix instruction. Each chunk leaves a partial result, and the
combine kernel, grid (sequence, query head), merges them; a chunk that is all of its row is finished
at once, but in the smallest batches.

With up to `FUSED_ROWS` sequences, where a kernel more would cost as much as it does, the kernel
also does what comes before: QK-norm and RoPE of the new queries and keys, and the KV store. The
newest token then enters its row's last chunk from registers, and the plan leaves it out.

Grid: (kv head, range). `plan_decode` deals the chunks out to ranges of about equal length, two
programs for each multiprocessor, and lists the tiles of each: the load is even however ragged the
batch, no program is launched for a context that might have been longer, and loads flow on from one
sequence to the next.

Bytes moved: each key and value once, 2 * context * kv heads * head_dim elements; partial results
add 1.5% (chunks of 128, two query heads a kv head; in proportion to the latter). Bound by memory.
"""

from heapq import heapreplace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from nanovllm.kernels._triton import (
    has_large_shared_memory,
    launch_next,
    pdl,
    prefer_shared_memory,
    tl,
    triton,
    wait_for_previous,
)
from nanovllm.kernels.paged_cache import LOG2_E, gather, tile_tokens
from nanovllm.kernels.qk_norm_rope_store import (
    norm_rope,
    norm_rope_factors,
    qk_norm_rope_store_triton,
)

MAX_CHUNKS = 32
FUSED_ROWS = 4
MANY_ROWS = 64
_FIRST, _LAST, _NEWEST = 128, 256, 512  # flags of a tile


class DecodePlan(NamedTuple):
    """The work of a decode step, for `paged_decode_triton`. All int32.

    `bounds`: [ranges + 1], where each range of tiles begins. `chunk_counts`: [rows]. `tiles`:
    [tiles, 2], the first slot of a tile and what it is: row, chunk, flags, tokens, from the high
    bits down.
    """

    bounds: np.ndarray
    chunk_counts: np.ndarray
    tiles: np.ndarray


def max_tiles(rows: int, max_context_len: int, block_size: int) -> int:
    """The most tiles that `plan_decode` makes."""
    return rows * -(-max_context_len // tile_tokens(block_size))


def plan_decode(
    context_lens: np.ndarray,
    block_tables: np.ndarray,
    block_size: int,
    num_ranges: int,
    padded_rows: int,
) -> DecodePlan:
    """Cut the contexts of a step into tiles and ranges.

    Args:
        context_lens: [rows], the newest token included.
        block_tables: [rows, width].
        num_ranges: from `num_decode_ranges`.
        padded_rows: the rows that the kernel will get.
    """
    tile = tile_tokens(block_size)
    fused = padded_rows <= FUSED_ROWS
    cached = context_lens - 1 if fused else context_lens
    counts = np.maximum(1, -(-cached // tile))  # tiles of a row
    # Tokens of a row's chunks: finer ones give more programs and ranges of more even lengths,
    # coarser ones fewer partial results.
    finest = 64 if fused else 128
    chunk = np.where(cached <= 512, finest, 2 * finest)
    if padded_rows > MANY_ROWS:
        chunk[:] = 512 if padded_rows <= 2 * MANY_ROWS else 1024
    long = cached > chunk * MAX_CHUNKS
    chunk[long] = -(-cached[long] // (MAX_CHUNKS * tile)) * tile
    per_chunk = chunk // tile
    chunk_counts = -(-counts // per_chunk)

    # Of each chunk: its row, its place in the row, its tiles.
    ends = np.cumsum(chunk_counts)
    row = np.repeat(np.arange(len(counts)), chunk_counts)
    index = np.arange(ends[-1]) - (ends - chunk_counts)[row]
    length = np.minimum(per_chunk[row], counts[row] - index * per_chunk[row])
    range_of = _balance(length, num_ranges)
    bounds = np.zeros(num_ranges + 1, dtype=np.int32)
    bounds[1:] = np.bincount(range_of, length, num_ranges).cumsum()

    # Of each tile, range by range: its chunk, and its place there.
    order = np.argsort(range_of, kind="stable")
    ends = np.cumsum(length[order])
    chunk_of = np.repeat(order, length[order])
    place = np.arange(ends[-1]) - np.repeat(ends - length[order], length[order])
    row, index = row[chunk_of], index[chunk_of]
    start = (index * per_chunk[row] + place) * tile
    tiles = np.empty((len(row), 2), dtype=np.int32)
    tiles[:, 0] = block_tables[row, start // block_size] * block_size + start % block_size
    tiles[:, 1] = row << 16 | index << 10 | np.minimum(cached[row] - start, tile)
    tiles[:, 1] += (place == 0) * _FIRST + (place == length[chunk_of] - 1) * _LAST
    tiles[:, 1] += (index == chunk_counts[row] - 1) * _NEWEST
    return DecodePlan(bounds, chunk_counts.astype(np.int32), tiles)


def _balance(lengths: np.ndarray, num_ranges: int) -> np.ndarray:
    """The range of each chunk: the longest chunk first, each to the range with the least so far.

    Graham's rule (1969, doi:10.1137/0117039).
    """
    range_of = np.empty(len(lengths), dtype=np.int64)
    loads = list(range(num_ranges))  # a heap of load * num_ranges + range
    weights = (lengths + 1) * num_ranges  # the ends of a chunk cost as much as a tile
    order = np.argsort(-lengths, kind="stable")
    for chunk, weight in zip(order.tolist(), weights[order].tolist()):
        range_of[chunk] = loads[0] % num_ranges
        heapreplace(loads, loads[0] + weight)
    return range_of


def num_decode_ranges(device: torch.device, num_kv_heads: int) -> int:
    """Ranges that give each multiprocessor two programs."""
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, programs // num_kv_heads)


def paged_decode_torch(q, k_cache, v_cache, context_lens, block_tables, scale):
    """Attention of one query a sequence to its context; see `paged_prefill.paged_prefill_triton`
    for the arguments. A context of 0 marks a padding row, whose output is zero."""
    out = torch.zeros_like(q)
    num_kv_heads, head_dim = k_cache.shape[2:]
    # The heads of a group are the queries of one head, so that each key is read once.
    groups = q.view(q.shape[0], num_kv_heads, -1, head_dim)
    tables = block_tables.tolist()
    for row, context_len in enumerate(context_lens.tolist()):
        if context_len:
            k, v = (gather(cache, tables[row], context_len) for cache in (k_cache, v_cache))
            attended = F.scaled_dot_product_attention(
                groups[row][None], k[None], v[None], scale=scale
            )
            out[row] = attended.reshape(-1, head_dim)
    return out


def paged_decode_triton(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    plan: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """QK-norm, RoPE and KV store of one new token a sequence, and attention to its context.

    Equal to `qk_norm_rope_store`, whose arguments it takes, and attention after it.

    Args:
        plan: a `DecodePlan` of the rows, on the device; rows without chunks are padding, and their
            output is zero.
        scale: applied to the scores, usually head_dim ** -0.5.

    Returns:
        [rows, num_heads, head_dim], in the dtype of `qkv`.
    """
    bounds, chunk_counts, tiles = plan
    rows = qkv.shape[0]
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    group = num_heads // num_kv_heads
    out = torch.empty(rows, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    shape = (rows, num_heads, MAX_CHUNKS)
    partial = torch.empty(*shape, head_dim, dtype=torch.float32, device=qkv.device)
    stats = torch.empty(2, *shape, dtype=torch.float32, device=qkv.device)
    wide = qkv.element_size() == 2
    block_d = triton.next_power_of_2(head_dim)
    fused = rows <= FUSED_ROWS
    stages = 4 if fused and has_large_shared_memory(qkv) else 3
    queries = qkv if fused else qk_norm_rope_store_triton(
        qkv, q_weight, k_weight, eps, cos_sin, positions, k_cache, v_cache, slot_mapping
    )  # fmt: skip
    _decode_kernel[(num_kv_heads, bounds.shape[0] - 1)](
        queries, q_weight, k_weight, eps, cos_sin, positions, k_cache, v_cache, slot_mapping,
        bounds, tiles, out, partial, stats[0], stats[1], scale * LOG2_E,
        num_kv_heads, head_dim,
        GROUP=group, BLOCK_G=max(16, triton.next_power_of_2(group)), BLOCK_D=block_d,
        BLOCK_N=tile_tokens(block_size), MAX_CHUNKS=MAX_CHUNKS,
        FUSED=fused, FIRST=_FIRST, LAST=_LAST, NEWEST=_NEWEST,
        PRECISION="tf32" if wide else "ieee", num_warps=4 if wide else 8,
        num_stages=stages if wide else 1, **pdl(qkv),
    )  # fmt: skip
    kernel = _combine_kernel[(rows, num_heads)](
        partial, stats[0], stats[1], out, chunk_counts, head_dim,
        MAX_CHUNKS=MAX_CHUNKS, BLOCK_C=8, BLOCK_D=block_d, FUSED=fused, num_warps=1, **pdl(qkv),
    )  # fmt: skip
    prefer_shared_memory(kernel)
    return out


@triton.jit
def _decode_kernel(
    q_ptr, q_weight_ptr, k_weight_ptr, eps, cos_sin_ptr, positions_ptr, k_ptr, v_ptr, slots_ptr,
    bounds_ptr, tiles_ptr, out_ptr, partial_ptr, best_ptr, total_ptr, scale_log2,
    num_kv_heads: tl.constexpr, head_dim: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MAX_CHUNKS: tl.constexpr, FUSED: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    NEWEST: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_next(PDL)
    kv_head = tl.program_id(0)
    first_tile = tl.load(bounds_ptr + tl.program_id(1))
    end_tile = tl.load(bounds_ptr + tl.program_id(1) + 1)
    if first_tile < end_tile:
        group = tl.arange(0, BLOCK_G)
        dims = tl.arange(0, BLOCK_D)
        one = tl.arange(0, 1)
        lanes = tl.arange(0, BLOCK_N)
        real = group < GROUP
        dim_mask = (dims < head_dim)[None, :]
        num_heads: tl.constexpr = num_kv_heads * GROUP
        token_stride: tl.constexpr = num_kv_heads * head_dim

        cells = lanes[:, None] * token_stride + kv_head * head_dim + dims[None, :]
        q = tl.zeros([BLOCK_G, BLOCK_D], k_ptr.dtype.element_ty)
        best = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)  # summed over the tile at a chunk's end
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        slot = tl.load(tiles_ptr + 2 * first_tile)
        info = tl.load(tiles_ptr + 2 * first_tile + 1)
        if not FUSED:
            wait_for_previous(PDL)
        for tile in range(first_tile, end_tile):
            # Loaded a tile ahead: an address that depends on a load just made stalls the pipeline.
            following = tl.minimum(tile + 1, end_tile - 1)
            next_slot = tl.load(tiles_ptr + 2 * following)
            next_info = tl.load(tiles_ptr + 2 * following + 1)
            valid = lanes < (info & (FIRST - 1))
            start = slot.to(tl.int64) * token_stride
            kv_mask = valid[:, None] & dim_mask
            k_tile = tl.load(k_ptr + start + cells, mask=kv_mask, other=0.0)
            v_tile = tl.load(v_ptr + start + cells, mask=kv_mask, other=0.0)
            row = info >> 16
            heads = kv_head * GROUP + group
            if not FUSED:
                own = q_ptr + row.to(tl.int64) * num_heads * head_dim
                q_mask = real[:, None] & dim_mask
                q = tl.load(own + heads[:, None] * head_dim + dims[None, :], mask=q_mask, other=0.0)
                is_first = (info & FIRST) != 0
                best = tl.where(is_first, float("-inf"), best)
                total = tl.where(is_first, 0.0, total)
                acc = tl.where(is_first, 0.0, acc)
            elif info & FIRST:
                position = tl.load(positions_ptr + row)
                cell = tl.load(slots_ptr + row).to(tl.int64) * token_stride + kv_head * head_dim
                q_own, q_partner = norm_rope_factors(
                    q_weight_ptr, cos_sin_ptr, position, dims, head_dim
                )
                k_own, k_partner = norm_rope_factors(
                    k_weight_ptr, cos_sin_ptr, position, dims, head_dim
                )
                qkv_row = q_ptr + row.to(tl.int64) * (num_heads + 2 * num_kv_heads) * head_dim
                wait_for_previous(PDL)  # all loads so far are of step inputs and earlier steps
                v_new = tl.load(
                    qkv_row + (num_heads + num_kv_heads + kv_head) * head_dim + dims[None, :],
                    mask=dim_mask, other=0.0,
                )  # fmt: skip
                k_new = norm_rope(
                    qkv_row, num_heads + kv_head + one, one == 0, k_own, k_partner, eps, dims,
                    head_dim,
                ).to(q.dtype)  # fmt: skip
                q = norm_rope(
                    qkv_row, heads, real, q_own, q_partner, eps, dims, head_dim
                ).to(q.dtype)  # fmt: skip
                best = tl.full([BLOCK_G], float("-inf"), tl.float32)
                total = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)
                acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
                if info & NEWEST:
                    tl.store(k_ptr + cell + dims[None, :], k_new, mask=dim_mask)
                    tl.store(v_ptr + cell + dims[None, :], v_new, mask=dim_mask)
                    products = q.to(tl.float32) * k_new.to(tl.float32)
                    best = tl.sum(products, axis=1) * scale_log2
                    total += tl.where(lanes == 0, 1.0, 0.0)[None, :]
                    acc += v_new.to(tl.float32)

            scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
            scores = tl.where(valid[None, :], scores, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_best[:, None])
            shrink = tl.exp2(best - new_best)
            total = total * shrink[:, None] + weights
            acc = acc * shrink[:, None]
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
            best = new_best

            if info & LAST:
                # A row with few others mostly has several chunks: no branch for it.
                chunk = (info >> 10) & 63
                is_whole_row = (chunk == 0) & ((info & NEWEST) != 0)
                head_of_row = row.to(tl.int64) * num_heads + heads
                mask = real[:, None] & dim_mask
                chunk_total = tl.sum(total, axis=1)
                if not FUSED and is_whole_row:
                    result = (acc / chunk_total[:, None]).to(out_ptr.dtype.element_ty)
                    cells_out = head_of_row[:, None] * head_dim + dims[None, :]
                    tl.store(out_ptr + cells_out, result, mask=mask)
                else:
                    place = head_of_row * MAX_CHUNKS + chunk
                    tl.store(best_ptr + place, best, mask=real)
                    tl.store(total_ptr + place, chunk_total, mask=real)
                    partials = partial_ptr + place[:, None] * head_dim + dims[None, :]
                    tl.store(partials, acc, mask=mask)
            slot, info = next_slot, next_info


@triton.jit
def _combine_kernel(
    partial_ptr, best_ptr, total_ptr, out_ptr, chunk_counts_ptr, head_dim,
    MAX_CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, FUSED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    launch_next(PDL)
    row = tl.program_id(0)
    head = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    num_chunks = tl.load(chunk_counts_ptr + row)
    wait_for_previous(PDL)
    if not FUSED and num_chunks == 1:
        return  # attention has written the result itself
    best = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_chunks, BLOCK_C):
        chunk = start + tl.arange(0, BLOCK_C)
        mask = chunk < num_chunks
        place = head * MAX_CHUNKS + chunk
        chunk_best = tl.load(best_ptr + place, mask=mask, other=float("-inf"))
        chunk_total = tl.load(total_ptr + place, mask=mask, other=0.0)
        cell_mask = mask[:, None] & (dims < head_dim)[None, :]
        cells = place[:, None] * head_dim + dims[None, :]
        partial = tl.load(partial_ptr + cells, mask=cell_mask, other=0.0)
        new_best = tl.maximum(best, tl.max(chunk_best, axis=0))
        weight = tl.exp2(chunk_best - new_best)
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(chunk_total * weight, axis=0)
        acc = acc * shrink + tl.sum(partial * weight[:, None], axis=0)
        best = new_best
    out = (acc / tl.maximum(total, 1e-30)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + head * head_dim + dims, out, mask=dims < head_dim)
