"""Between the q/k/v projection and attention, in one pass: QK-norm, RoPE, KV store.

For each token, from its row [q heads | k heads | v heads] of the projection: queries and keys are
normalised over head_dim (QK-norm, if the model has it), rotated by their position (RoPE, Su et al.
2021, arXiv:2104.09864, in the half-split layout of GPT-NeoX), and keys and values go straight to
their slot of the paged cache; only the queries come back.

Grid: (token, up to 8 heads: the queries', then keys and values together). Bytes moved a token: (q +
k + v heads) * head_dim elements read and as many written, plus one float32 row of the cos/sin
table. Bound by memory. A negative slot is written nowhere.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.launch import cdiv, launch_dependents, next_power_of_2, pdl, wait
from nanovllm.kernels.paged_cache import as_stored


def qk_norm_rope_store(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Queries ready for attention; keys and values stored in the cache, in place.

    Args:
        qkv: [tokens, (num_heads + 2 * num_kv_heads) * head_dim].
        q_weight, k_weight: [head_dim], the norms' weights; both None without QK-norm.
        cos_sin: [max positions, head_dim] float32, cosines then sines of half the dimensions.
        positions: [tokens] int32.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim].
        slot_mapping: [tokens] int32, block * block_size + offset; -1 for a padding row.
        kv_scales: [2, num_kv_heads] float32, of keys and values, for a cache in fp8.

    Returns:
        [tokens, num_heads, head_dim], in the dtype of `qkv`.
    """
    num_kv_heads, head_dim = k_cache.shape[-2:]
    tokens = qkv.shape[0]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q_out = torch.empty(tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    heads = min(8, next_power_of_2(num_kv_heads))
    grid = (tokens, cdiv(num_heads, heads) + cdiv(num_kv_heads, heads))
    _qk_norm_rope_store_kernel[grid](
        qkv, q_weight, k_weight, eps, cos_sin, positions, q_out, k_cache, v_cache, slot_mapping,
        kv_scales, num_heads, num_kv_heads, head_dim, HAS_NORM=q_weight is not None,
        HEADS=heads, BLOCK_D=next_power_of_2(head_dim), num_warps=4, **pdl(qkv),
    )  # fmt: skip
    return q_out


@triton.jit
def norm_rope_factors(
    weight_ptr, cos_sin_ptr, position, dims, head_dim: tl.constexpr, HAS_NORM: tl.constexpr
):
    """What `norm_rope` multiplies an element and its rotation partner by: two rows of [dims]."""
    half: tl.constexpr = head_dim // 2
    lower = dims < half
    partners = tl.where(lower, dims + half, dims - half)
    mask = dims < head_dim
    if HAS_NORM:
        own_weight = tl.load(weight_ptr + dims, mask=mask, other=0.0).to(tl.float32)
        partner_weight = tl.load(weight_ptr + partners, mask=mask, other=0.0).to(tl.float32)
    angles = cos_sin_ptr + position.to(tl.int64) * head_dim + tl.where(lower, dims, partners)
    cos = tl.load(angles, mask=mask, other=0.0)
    sin = tl.load(angles + half, mask=mask, other=0.0)
    if HAS_NORM:
        return (own_weight * cos)[None, :], (partner_weight * tl.where(lower, -sin, sin))[None, :]
    else:
        return cos[None, :], tl.where(lower, -sin, sin)[None, :]


@triton.jit
def norm_rope(
    row_ptr, heads, head_mask, own_factor, partner_factor, eps, dims, head_dim: tl.constexpr,
    HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Some heads of a token's row, normalised if the model does that, and rotated: [heads, dims]
    float32.

    Each lane loads its rotation partner, half a head away, beside its own element.
    """
    half: tl.constexpr = head_dim // 2
    partners = tl.where(dims < half, dims + half, dims - half)
    mask = head_mask[:, None] & (dims < head_dim)[None, :]
    cells = row_ptr + heads[:, None] * head_dim
    own = tl.load(cells + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(cells + partners[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(own * own, axis=1) / head_dim + eps)
        return (own * own_factor + partner * partner_factor) * scale[:, None]
    else:
        return own * own_factor + partner * partner_factor


@triton.jit
def _qk_norm_rope_store_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, eps, cos_sin_ptr, positions_ptr,
    q_out_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, kv_scales_ptr,
    num_heads: tl.constexpr, num_kv_heads: tl.constexpr, head_dim: tl.constexpr,
    HAS_NORM: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    row_ptr = qkv_ptr + token * (num_heads + 2 * num_kv_heads) * head_dim
    position = tl.load(positions_ptr + token)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    query_programs: tl.constexpr = (num_heads + HEADS - 1) // HEADS
    part = tl.program_id(1)
    weight_ptr = None
    if HAS_NORM:
        weight_ptr = q_weight_ptr if part < query_programs else k_weight_ptr
    own_factor, partner_factor = norm_rope_factors(
        weight_ptr, cos_sin_ptr, position, dims, head_dim, HAS_NORM
    )
    wait(PDL)
    if part < query_programs:
        heads = part * HEADS + tl.arange(0, HEADS)
        real = heads < num_heads
        q = norm_rope(
            row_ptr, heads, real, own_factor, partner_factor, eps, dims, head_dim, HAS_NORM
        )
        cells = (token * num_heads + heads)[:, None] * head_dim + dims[None, :]
        mask = real[:, None] & (dims < head_dim)[None, :]
        tl.store(q_out_ptr + cells, q.to(q_out_ptr.dtype.element_ty), mask=mask)
    elif slot >= 0:
        heads = (part - query_programs) * HEADS + tl.arange(0, HEADS)
        real = heads < num_kv_heads
        k = norm_rope(
            row_ptr, num_heads + heads, real, own_factor, partner_factor, eps, dims, head_dim,
            HAS_NORM,
        )  # fmt: skip
        mask = real[:, None] & (dims < head_dim)[None, :]
        values = row_ptr + (num_heads + num_kv_heads + heads)[:, None] * head_dim + dims[None, :]
        cells = (slot * num_kv_heads + heads)[:, None] * head_dim + dims[None, :]
        dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
        if kv_scales_ptr is None:
            tl.store(k_cache_ptr + cells, k.to(dtype), mask=mask)
            tl.store(v_cache_ptr + cells, tl.load(values, mask=mask, other=0.0), mask=mask)
        else:
            k_scale = tl.load(kv_scales_ptr + heads, mask=real, other=1.0)[:, None]
            v_scale = tl.load(kv_scales_ptr + num_kv_heads + heads, mask=real, other=1.0)[:, None]
            v = tl.load(values, mask=mask, other=0.0).to(tl.float32)
            tl.store(k_cache_ptr + cells, as_stored(k, k_scale, dtype), mask=mask)
            tl.store(v_cache_ptr + cells, as_stored(v, v_scale, dtype), mask=mask)
