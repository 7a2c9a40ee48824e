"""Attention over a paged KV cache: one kernel for prefill, one (and its combine) for decode.

Both are FlashAttention-style online softmax (Dao 2023, arXiv:2307.08691) in base 2, with keys and
values read tile by tile through the block table; a tile never crosses a KV block.

Prefill. Grid: (query tile of 64 or 128, query head, sequence), longest rows first. Queries are the
last `query_len` tokens of their sequence (the rest was cached or computed before), causal. Bound by
arithmetic: 4 * head_dim operations a query, key and head.

Decode. Grid: (sequence, kv head, chunk of CHUNK tokens); the query heads that share a kv head go
together, padded to the 16 rows of a matrix instruction. Each program leaves a partial result, and
the combine kernel, grid (sequence, query head), merges them. Chunks lie at fixed places, so the
result of a row does not depend on its batch. Bytes moved: each key and value once,
2 * context * kv heads * head_dim elements, and all but nothing else. Bound by memory.
"""

import torch
import torch.nn.functional as F

from nanovllm.kernels._triton import tl, triton

CHUNK = 512
LOG2_E = 1.4426950408889634


def paged_prefill_torch(q, k_cache, v_cache, cu_seqlens_q, context_lens, block_tables, scale):
    """The reference: see `paged_prefill_triton`."""
    out = torch.empty_like(q)
    starts, tables = cu_seqlens_q.tolist(), block_tables.tolist()
    for row, context_len in enumerate(context_lens.tolist()):
        start, end = starts[row], starts[row + 1]
        k, v = (_gather(cache, tables[row], context_len) for cache in (k_cache, v_cache))
        query = q[start:end].transpose(0, 1)
        cached = context_len - (end - start)
        mask = None
        if cached:
            mask = torch.ones(end - start, context_len, dtype=torch.bool, device=q.device)
            mask = mask.tril(diagonal=cached)
        attended = F.scaled_dot_product_attention(
            query[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=scale,
            enable_gqa=True,
        )  # fmt: skip
        out[start:end] = attended[0].transpose(0, 1)
    return out


def paged_decode_torch(q, k_cache, v_cache, context_lens, block_tables, scale):
    """The reference: see `paged_decode_triton`."""
    out = torch.zeros_like(q)
    num_kv_heads, head_dim = k_cache.shape[2:]
    # The heads of a group are the queries of one head, so that each key is read once.
    groups = q.view(q.shape[0], num_kv_heads, -1, head_dim)
    tables = block_tables.tolist()
    for row, context_len in enumerate(context_lens.tolist()):
        if context_len:
            k, v = (_gather(cache, tables[row], context_len) for cache in (k_cache, v_cache))
            attended = F.scaled_dot_product_attention(
                groups[row][None], k[None], v[None], scale=scale
            )
            out[row] = attended.reshape(-1, head_dim)
    return out


def _gather(cache: torch.Tensor, block_table: list[int], context_len: int) -> torch.Tensor:
    """One sequence's keys or values: [num_kv_heads, context_len, head_dim]."""
    num_blocks = -(-context_len // cache.shape[1])
    if num_blocks == 1:
        tokens = cache[block_table[0], :context_len]
    else:
        tokens = cache[block_table[:num_blocks]].flatten(0, 1)[:context_len]
    return tokens.transpose(0, 1)


def paged_prefill_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    max_seqlen_q: int,
) -> torch.Tensor:
    """Causal attention of ragged prompts, each query to all tokens of its sequence up to itself.

    Args:
        q: [tokens, num_heads, head_dim], the sequences' new tokens one after the other.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], new tokens stored.
        cu_seqlens_q: [sequences + 1] int32, where each sequence's queries begin in `q`.
        context_lens: [sequences] int32, cached and new tokens together.
        block_tables: [sequences, width] int32.
        scale: applied to the scores, usually head_dim ** -0.5.
        max_seqlen_q: the most new tokens of a sequence.

    Returns:
        Like `q`.
    """
    out = torch.empty_like(q)
    _, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    wide = q.element_size() == 2
    block_m = 128 if wide and max_seqlen_q > 64 else 64 if max_seqlen_q > 16 else 16
    grid = (triton.cdiv(max_seqlen_q, block_m), num_heads, context_lens.shape[0])
    _prefill_kernel[grid](
        q, k_cache, v_cache, out, cu_seqlens_q, context_lens, block_tables,
        scale * LOG2_E, block_tables.stride(0), block_size,
        num_heads, num_kv_heads, head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_M=block_m,
        BLOCK_N=_tile_tokens(block_size, 64 if wide else 16),
        PRECISION="tf32" if wide else "ieee",
        num_warps=8 if block_m == (128 if wide else 64) else 4, num_stages=3 if wide else 1,
    )  # fmt: skip
    return out


def paged_decode_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    max_context_len: int,
) -> torch.Tensor:
    """Attention of one query a sequence to the whole of its context.

    Args:
        q: [sequences, num_heads, head_dim].
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim].
        context_lens: [sequences] int32; 0 marks a padding row, whose output is zero.
        block_tables: [sequences, width] int32.
        scale: applied to the scores, usually head_dim ** -0.5.
        max_context_len: no context is longer.

    Returns:
        Like `q`.
    """
    out = torch.empty_like(q)
    rows, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    chunks = triton.cdiv(max_context_len, CHUNK)
    partial = torch.empty(rows, num_heads, chunks, head_dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(2, rows, num_heads, chunks, dtype=torch.float32, device=q.device)
    wide = q.element_size() == 2
    block_d = triton.next_power_of_2(head_dim)
    _decode_kernel[(rows, num_kv_heads, chunks)](
        q, k_cache, v_cache, partial, stats[0], stats[1], context_lens, block_tables,
        scale * LOG2_E, block_tables.stride(0), block_size,
        num_kv_heads, head_dim,
        GROUP=group, BLOCK_G=max(16, triton.next_power_of_2(group)), BLOCK_D=block_d,
        BLOCK_N=_tile_tokens(block_size, 64), CHUNK=CHUNK,
        PRECISION="tf32" if wide else "ieee", num_warps=4 if wide else 8,
        num_stages=3 if wide else 1,
    )  # fmt: skip
    _combine_kernel[(rows, num_heads)](
        partial, stats[0], stats[1], out, context_lens, chunks, head_dim,
        BLOCK_S=16, BLOCK_D=block_d, CHUNK=CHUNK, num_warps=2,
    )  # fmt: skip
    return out


def _tile_tokens(block_size: int, limit: int) -> int:
    """Tokens of a tile: the largest power of two that divides the block size, within limits."""
    return max(16, min(limit, block_size & -block_size))


@triton.jit
def _attend(q, k_tile, v_tile, valid, best, total, acc, scale_log2, PRECISION: tl.constexpr):
    """Fold one tile of keys and values into the running (max, sum, weighted values)."""
    scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
    scores = tl.where(valid, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_best[:, None])
    shrink = tl.exp2(best - new_best)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return new_best, total, acc


@triton.jit
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, cu_seqlens_ptr, context_lens_ptr, block_tables_ptr,
    scale_log2, table_stride, block_size: tl.constexpr, num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr, head_dim: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    seq, head = tl.program_id(2), tl.program_id(1)
    query_start = tl.load(cu_seqlens_ptr + seq)
    query_len = tl.load(cu_seqlens_ptr + seq + 1) - query_start
    context_len = tl.load(context_lens_ptr + seq)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if tile * BLOCK_M < query_len:
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        dims = tl.arange(0, BLOCK_D)
        offsets = ((query_start + rows).to(tl.int64) * num_heads + head) * head_dim
        q_mask = (rows < query_len)[:, None] & (dims < head_dim)[None, :]
        q = tl.load(q_ptr + offsets[:, None] + dims[None, :], mask=q_mask, other=0.0)
        positions = context_len - query_len + rows
        kv_head = head // (num_heads // num_kv_heads)
        token_stride = num_kv_heads * head_dim

        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        # Keys that the tile's last real query sees.
        last = tl.minimum(context_len - query_len + tile * BLOCK_M + BLOCK_M, context_len)
        block_tables_ptr += seq.to(tl.int64) * table_stride
        for start in range(0, last, BLOCK_N):
            block = tl.load(block_tables_ptr + start // block_size).to(tl.int64)
            tokens = start + tl.arange(0, BLOCK_N)
            slots = block * block_size + start % block_size + tl.arange(0, BLOCK_N)
            cells = slots[:, None] * token_stride + kv_head * head_dim + dims[None, :]
            kv_mask = (tokens < context_len)[:, None] & (dims < head_dim)[None, :]
            k_tile = tl.load(k_ptr + cells, mask=kv_mask, other=0.0)
            v_tile = tl.load(v_ptr + cells, mask=kv_mask, other=0.0)
            valid = tokens[None, :] <= positions[:, None]
            best, total, acc = _attend(
                q, k_tile, v_tile, valid, best, total, acc, scale_log2, PRECISION
            )
        out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets[:, None] + dims[None, :], out, mask=q_mask)


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, partial_ptr, best_ptr, total_ptr, context_lens_ptr, block_tables_ptr,
    scale_log2, table_stride, block_size: tl.constexpr, num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, kv_head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context_len = tl.load(context_lens_ptr + row)
    first = chunk * CHUNK
    if first < context_len:
        group = tl.arange(0, BLOCK_G)
        dims = tl.arange(0, BLOCK_D)
        heads = row * num_kv_heads * GROUP + kv_head * GROUP + group
        q_mask = (group < GROUP)[:, None] & (dims < head_dim)[None, :]
        q = tl.load(q_ptr + heads[:, None] * head_dim + dims[None, :], mask=q_mask, other=0.0)

        best = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        last = tl.minimum(first + CHUNK, context_len)
        token_stride = num_kv_heads * head_dim
        block_tables_ptr += row.to(tl.int64) * table_stride
        block = tl.load(block_tables_ptr + first // block_size).to(tl.int64)
        for start in range(first, last, BLOCK_N):
            # The next tile's block is loaded a tile ahead, so that its latency stays hidden.
            following = tl.minimum(start + BLOCK_N, last - 1)
            next_block = tl.load(block_tables_ptr + following // block_size).to(tl.int64)
            tokens = start + tl.arange(0, BLOCK_N)
            slots = block * block_size + start % block_size + tl.arange(0, BLOCK_N)
            cells = slots[:, None] * token_stride + kv_head * head_dim + dims[None, :]
            kv_mask = (tokens < last)[:, None] & (dims < head_dim)[None, :]
            k_tile = tl.load(k_ptr + cells, mask=kv_mask, other=0.0)
            v_tile = tl.load(v_ptr + cells, mask=kv_mask, other=0.0)
            valid = (tokens < last)[None, :]
            best, total, acc = _attend(
                q, k_tile, v_tile, valid, best, total, acc, scale_log2, PRECISION
            )
            block = next_block
        slot = heads.to(tl.int64) * tl.num_programs(2) + chunk
        real = group < GROUP
        tl.store(best_ptr + slot, best, mask=real)
        tl.store(total_ptr + slot, total, mask=real)
        tl.store(partial_ptr + slot[:, None] * head_dim + dims[None, :], acc, mask=q_mask)


@triton.jit
def _combine_kernel(
    partial_ptr, best_ptr, total_ptr, out_ptr, context_lens_ptr, max_chunks, head_dim,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    num_chunks = tl.cdiv(tl.load(context_lens_ptr + row), CHUNK)
    best = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_chunks, BLOCK_S):
        chunk = start + tl.arange(0, BLOCK_S)
        mask = chunk < num_chunks
        slot = head * max_chunks + chunk
        chunk_best = tl.load(best_ptr + slot, mask=mask, other=float("-inf"))
        chunk_total = tl.load(total_ptr + slot, mask=mask, other=0.0)
        cell_mask = mask[:, None] & (dims < head_dim)[None, :]
        cells = slot[:, None] * head_dim + dims[None, :]
        partial = tl.load(partial_ptr + cells, mask=cell_mask, other=0.0)
        new_best = tl.maximum(best, tl.max(chunk_best, axis=0))
        weight = tl.exp2(chunk_best - new_best)
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(chunk_total * weight, axis=0)
        acc = acc * shrink + tl.sum(partial * weight[:, None], axis=0)
        best = new_best
    out = (acc / tl.maximum(total, 1e-30)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + head * head_dim + dims, out, mask=dims < head_dim)
