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
sequence to the next. Chunks that several rows share are not among them: `kernels.shared_attention`
leaves their partial results where the combine kernel finds them.

Bytes moved: each key and value once, 2 * context * kv heads * head_dim elements; partial results
add 1.5% (chunks of 128, two query heads a kv head; in proportion to the latter). Bound by memory;
in fp8, of half the bytes, by the instructions that widen them.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.decode_plan import (
    CHUNK_SHIFT,
    FIRST,
    FUSED_ROWS,
    LAST,
    MAX_CHUNKS,
    NEWEST,
    DecodePlan,
    decode_tile,
    num_spans,
)
from nanovllm.kernels.launch import (
    gpu_of,
    gpu_with,
    launch_dependents,
    next_power_of_2,
    pdl,
    prefer_shared_memory,
    wait,
)
from nanovllm.kernels.paged_cache import LOG2_E, as_stored, dot_type, load_slots
from nanovllm.kernels.rope_store import norm_rope, norm_rope_factors, qk_norm_rope_store
from nanovllm.kernels.shared_attention import attend_shared
from nanovllm.kernels.value_tiles import (
    add_values,
    dims_of_part,
    no_values,
    scaled_values,
    value_words,
    values_unless,
)


def num_decode_ranges(device: torch.device, num_kv_heads: int) -> int:
    """Ranges that give each multiprocessor two programs."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return max(1, 2 * gpu_of(index).num_sms // num_kv_heads)


def paged_decode(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    plan: DecodePlan,
    scale: float,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """QK-norm, RoPE and KV store of one new token a sequence, and attention to its context.

    Equal to `qk_norm_rope_store`, whose arguments it takes, and attention after it.

    Args:
        plan: of the rows, on the device; the output of padding rows is zero.
        scale: applied to the scores, usually head_dim ** -0.5.
        kv_scales: [2, num_kv_heads] float32, of keys and values, for a cache in fp8.

    Returns:
        [rows, num_heads, head_dim], in the dtype of `qkv`.
    """
    bounds, chunk_counts, tiles, list_begin = plan
    rows = qkv.shape[0]
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    group = num_heads // num_kv_heads
    out = torch.empty(rows, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    shape = (rows, num_heads, MAX_CHUNKS)
    partial = torch.empty(*shape, head_dim, dtype=torch.float32, device=qkv.device)
    stats = torch.empty(2, *shape, dtype=torch.float32, device=qkv.device)
    wide = qkv.element_size() == 2
    block_d = next_power_of_2(head_dim)
    fused = rows <= FUSED_ROWS
    values, parts = value_words(v_cache)
    tile = decode_tile(rows, head_dim, in_fp8=kv_scales is not None)
    gpu = gpu_with(qkv)
    stages = 4 if fused and gpu is not None and gpu.is_hopper_class else 3
    queries = qkv if fused else qk_norm_rope_store(
        qkv, q_weight, k_weight, eps, cos_sin, positions, k_cache, v_cache, slot_mapping, kv_scales
    )  # fmt: skip
    if list_begin is not None:
        attend_shared(queries, k_cache, v_cache, plan, partial, stats, scale, kv_scales)
    kernel = _decode_kernel[(num_kv_heads, bounds.shape[0] - 1)](
        queries, q_weight, k_weight, eps, cos_sin, positions, k_cache, v_cache, values,
        slot_mapping, bounds, tiles, out, partial, stats[0], stats[1], scale * LOG2_E, kv_scales,
        num_kv_heads, head_dim, DTYPE=dot_type(qkv.dtype, k_cache), GROUP=group,
        BLOCK_G=max(16, next_power_of_2(group)), BLOCK_D=block_d, PARTS=parts,
        BLOCK_N=tile, SPANS=num_spans(tile, block_size), MAX_CHUNKS=MAX_CHUNKS, FUSED=fused,
        HAS_NORM=q_weight is not None, FIRST=FIRST, LAST=LAST, NEWEST=NEWEST,
        CHUNK_SHIFT=CHUNK_SHIFT,
        PRECISION="tf32" if wide else "ieee", num_warps=4 if wide else 8,
        num_stages=stages if wide else 1, **pdl(qkv),
    )  # fmt: skip
    prefer_shared_memory(kernel)
    kernel = _combine_kernel[(rows, num_heads)](
        partial, stats[0], stats[1], out, chunk_counts, head_dim,
        MAX_CHUNKS=MAX_CHUNKS, BLOCK_C=8, BLOCK_D=block_d, FUSED=fused, num_warps=1, **pdl(qkv),
    )  # fmt: skip
    prefer_shared_memory(kernel)
    return out


@triton.jit
def _decode_kernel(
    q_ptr, q_weight_ptr, k_weight_ptr, eps, cos_sin_ptr, positions_ptr, k_ptr, v_ptr, values_ptr,
    slots_ptr, bounds_ptr, tiles_ptr, out_ptr, partial_ptr, m_ptr, l_ptr, scale_log2, kv_scales_ptr,
    num_kv_heads: tl.constexpr, head_dim: tl.constexpr, DTYPE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SPANS: tl.constexpr, PARTS: tl.constexpr, MAX_CHUNKS: tl.constexpr, FUSED: tl.constexpr,
    HAS_NORM: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, NEWEST: tl.constexpr,
    CHUNK_SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
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

        tokens = (lanes % (BLOCK_N // SPANS))[:, None]  # of a span
        cells = tokens * token_stride + kv_head * head_dim + dims[None, :]
        words = tl.arange(0, BLOCK_D // PARTS)[None, :]
        word_mask = words < head_dim // PARTS
        words = tokens * (token_stride // PARTS) + kv_head * (head_dim // PARTS) + words
        q = tl.zeros([BLOCK_G, BLOCK_D], DTYPE)
        if kv_scales_ptr is not None:
            k_scale = tl.load(kv_scales_ptr + kv_head)
            v_scale = tl.load(kv_scales_ptr + num_kv_heads + kv_head)
            scale_log2 *= k_scale
        m = tl.full([BLOCK_G], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)  # summed over the tile at a chunk's end
        acc = no_values(BLOCK_G, BLOCK_D, PARTS)
        width: tl.constexpr = SPANS + 1
        slot = load_slots(tiles_ptr + width * first_tile, BLOCK_N, SPANS)
        info = tl.load(tiles_ptr + width * first_tile + SPANS)
        if not FUSED:
            wait(PDL)
        for tile in range(first_tile, end_tile):
            # Loaded a tile ahead: an address that depends on a load just made stalls the pipeline.
            following = tl.minimum(tile + 1, end_tile - 1)
            next_slot = load_slots(tiles_ptr + width * following, BLOCK_N, SPANS)
            next_info = tl.load(tiles_ptr + width * following + SPANS)
            valid = lanes < (info & (FIRST - 1))
            start = slot.to(tl.int64) * token_stride
            k_tile = tl.load(k_ptr + start + cells, mask=valid[:, None] & dim_mask, other=0.0)
            v_tile = tl.load(
                values_ptr + start // PARTS + words, mask=valid[:, None] & word_mask, other=0.0
            )
            row = info >> 16
            heads = kv_head * GROUP + group
            if not FUSED:
                own = q_ptr + row.to(tl.int64) * num_heads * head_dim
                q_mask = real[:, None] & dim_mask
                q = tl.load(own + heads[:, None] * head_dim + dims[None, :], mask=q_mask, other=0.0)
                q = q.to(DTYPE)
                is_first = (info & FIRST) != 0
                m = tl.where(is_first, float("-inf"), m)
                l = tl.where(is_first, 0.0, l)
                acc = values_unless(is_first, acc)
            elif info & FIRST:
                position = tl.load(positions_ptr + row)
                cell = tl.load(slots_ptr + row).to(tl.int64) * token_stride + kv_head * head_dim
                q_own, q_partner = norm_rope_factors(
                    q_weight_ptr, cos_sin_ptr, position, dims, head_dim, HAS_NORM
                )
                k_own, k_partner = norm_rope_factors(
                    k_weight_ptr, cos_sin_ptr, position, dims, head_dim, HAS_NORM
                )
                qkv_row = q_ptr + row.to(tl.int64) * (num_heads + 2 * num_kv_heads) * head_dim
                wait(PDL)  # all loads so far are of step inputs and earlier steps
                new_values = qkv_row + (num_heads + num_kv_heads + kv_head) * head_dim
                v_new = tl.load(new_values + dims[None, :], mask=dim_mask, other=0.0)
                k_new = norm_rope(
                    qkv_row, num_heads + kv_head + one, one == 0, k_own, k_partner, eps, dims,
                    head_dim, HAS_NORM,
                )  # fmt: skip
                if kv_scales_ptr is not None:
                    v_new = as_stored(v_new.to(tl.float32), v_scale, k_ptr.dtype.element_ty)
                    k_new = as_stored(k_new, k_scale, k_ptr.dtype.element_ty)
                k_new = k_new.to(k_ptr.dtype.element_ty)
                q = norm_rope(
                    qkv_row, heads, real, q_own, q_partner, eps, dims, head_dim, HAS_NORM
                ).to(q.dtype)  # fmt: skip
                m = tl.full([BLOCK_G], float("-inf"), tl.float32)
                l = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)
                acc = no_values(BLOCK_G, BLOCK_D, PARTS)
                if info & NEWEST:
                    tl.store(k_ptr + cell + dims[None, :], k_new, mask=dim_mask)
                    tl.store(v_ptr + cell + dims[None, :], v_new, mask=dim_mask)
                    products = q.to(tl.float32) * k_new.to(tl.float32)
                    m = tl.sum(products, axis=1) * scale_log2
                    l += tl.where(lanes == 0, 1.0, 0.0)[None, :]
                    if PARTS == 1:
                        acc = (acc[0] + v_new.to(tl.float32),)
                    else:
                        acc = _new_values(acc, new_values, v_scale, head_dim, BLOCK_D)

            k_tile = k_tile.to(DTYPE)
            scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
            scores = tl.where(valid[None, :], scores, float("-inf"))
            m_new = tl.maximum(m, tl.max(scores, axis=1))
            weights = tl.exp2(scores - m_new[:, None])
            alpha = tl.exp2(m - m_new)
            l = l * alpha[:, None] + weights
            acc = scaled_values(acc, alpha[:, None])
            acc = add_values(acc, weights.to(DTYPE), v_tile, DTYPE, PRECISION)
            m = m_new

            if info & LAST:
                # A row with few others mostly has several chunks: no branch for it.
                chunk = (info >> CHUNK_SHIFT) & (MAX_CHUNKS - 1)
                is_whole_row = (chunk == 0) & ((info & NEWEST) != 0)
                head_of_row = row.to(tl.int64) * num_heads + heads
                place = head_of_row * MAX_CHUNKS + chunk
                l_chunk = tl.sum(l, axis=1)
                if kv_scales_ptr is not None:
                    acc = scaled_values(acc, v_scale)
                if FUSED or not is_whole_row:
                    tl.store(m_ptr + place, m, mask=real)
                    tl.store(l_ptr + place, l_chunk, mask=real)
                for part in tl.static_range(PARTS):
                    part_dims = dims_of_part(part, BLOCK_D, PARTS)[None, :]
                    mask = real[:, None] & (part_dims < head_dim)
                    if not FUSED and is_whole_row:
                        result = (acc[part] / l_chunk[:, None]).to(out_ptr.dtype.element_ty)
                        cells_out = head_of_row[:, None] * head_dim + part_dims
                        tl.store(out_ptr + cells_out, result, mask=mask)
                    else:
                        partials = partial_ptr + place[:, None] * head_dim + part_dims
                        tl.store(partials, acc[part], mask=mask)
            slot, info = next_slot, next_info


@triton.jit
def _new_values(sums, values_ptr, v_scale, head_dim: tl.constexpr, BLOCK_D: tl.constexpr):
    """Add a token's values as the cache holds them in fp8, to each part its own."""
    added = ()
    for part in tl.static_range(len(sums)):
        dims = dims_of_part(part, BLOCK_D, len(sums))[None, :]
        values = tl.load(values_ptr + dims, mask=dims < head_dim, other=0.0).to(tl.float32)
        added += (sums[part] + as_stored(values, v_scale, tl.float8e4nv).to(tl.float32),)
    return added


@triton.jit
def _combine_kernel(
    partial_ptr, m_ptr, l_ptr, out_ptr, chunk_counts_ptr, head_dim,
    MAX_CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, FUSED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    row = tl.program_id(0)
    head = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    num_chunks = tl.load(chunk_counts_ptr + row)
    wait(PDL)
    if not FUSED and num_chunks == 1:
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
