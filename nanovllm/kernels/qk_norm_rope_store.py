"""Between the q/k/v projection and attention, in one pass: QK-norm, RoPE, KV store.

For each token, from its row [q heads | k heads | v heads] of the projection: queries and keys are
normalised over head_dim (Qwen3's QK-norm), rotated by their position (RoPE, Su et al. 2021,
arXiv:2104.09864, in the half-split layout of GPT-NeoX), and keys and values go straight to their
slot of the paged cache; only the queries come back.

Grid: (token, head). Bytes moved a token: (q + k + v heads) * head_dim elements read and as many
written, plus one float32 row of the cos/sin table. Bound by memory. A negative slot is written
nowhere.
"""

import torch
import torch.nn.functional as F

from nanovllm.kernels._triton import HAS_TRITON, tl, triton


def qk_norm_rope_store(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Queries ready for attention; keys and values stored in the cache, in place.

    Args:
        qkv: [tokens, (num_heads + 2 * num_kv_heads) * head_dim].
        q_weight, k_weight: [head_dim], the norms' weights.
        cos_sin: [max positions, head_dim] float32, cosines then sines of half the dimensions.
        positions: [tokens] int32.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim].
        slot_mapping: [tokens] int32, block * block_size + offset; -1 for a padding row.

    Returns:
        [tokens, num_heads, head_dim], in the dtype of `qkv`.
    """
    args = (qkv, q_weight, k_weight, eps, cos_sin, positions, k_cache, v_cache, slot_mapping)
    if qkv.is_cuda and HAS_TRITON:
        return qk_norm_rope_store_triton(*args)
    return qk_norm_rope_store_torch(*args)


def qk_norm_rope_store_torch(
    qkv, q_weight, k_weight, eps, cos_sin, positions, k_cache, v_cache, slot_mapping
):
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    qk, v = heads.split([num_heads + num_kv_heads, num_kv_heads], dim=1)
    weight = torch.cat((q_weight.expand(num_heads, -1), k_weight.expand(num_kv_heads, -1)))
    qk = F.rms_norm(qk.float(), (head_dim,), eps=eps).mul_(weight)
    _rotate_(qk, cos_sin[positions].unsqueeze(1))
    q, k = qk.to(qkv.dtype).split([num_heads, num_kv_heads], dim=1)
    slots = slot_mapping.long()
    if slots.min() < 0:
        k, v, slots = k[slots >= 0], v[slots >= 0], slots[slots >= 0]
    places = slots // block_size, slots % block_size
    k_cache[places], v_cache[places] = k, v
    return q


def _rotate_(x: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """Rotate the pairs (x[i], x[i + half]) of the last dimension, in place."""
    cos, sin = cos_sin.chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    turned = second * sin
    second.mul_(cos).addcmul_(first, sin)
    first.mul_(cos).sub_(turned)


def qk_norm_rope_store_triton(
    qkv, q_weight, k_weight, eps, cos_sin, positions, k_cache, v_cache, slot_mapping
):
    num_kv_heads, head_dim = k_cache.shape[-2:]
    tokens = qkv.shape[0]
    all_heads = qkv.shape[1] // head_dim
    num_heads = all_heads - 2 * num_kv_heads
    q_out = torch.empty(tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    _qk_norm_rope_store_kernel[(tokens, all_heads)](
        qkv, q_weight, k_weight, eps, cos_sin, positions, q_out, k_cache, v_cache, slot_mapping,
        num_heads, num_kv_heads,
        HALF=head_dim // 2, BLOCK=triton.next_power_of_2(head_dim // 2), num_warps=1,
    )  # fmt: skip
    return q_out


@triton.jit
def _qk_norm_rope_store_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, eps, cos_sin_ptr, positions_ptr,
    q_out_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, num_heads, num_kv_heads,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    mask = cols < HALF
    source = qkv_ptr + (token * (num_heads + 2 * num_kv_heads) + head) * 2 * HALF + cols
    first = tl.load(source, mask=mask, other=0.0)
    second = tl.load(source + HALF, mask=mask, other=0.0)
    slot = tl.load(slots_ptr + token).to(tl.int64)

    if head >= num_heads + num_kv_heads:  # a value head: only stored
        if slot >= 0:
            target = (slot * num_kv_heads + head - num_heads - num_kv_heads) * 2 * HALF + cols
            tl.store(v_cache_ptr + target, first, mask=mask)
            tl.store(v_cache_ptr + target + HALF, second, mask=mask)
    else:
        x, y = first.to(tl.float32), second.to(tl.float32)
        scale = tl.rsqrt((tl.sum(x * x, axis=0) + tl.sum(y * y, axis=0)) / (2 * HALF) + eps)
        weight_ptr = q_weight_ptr if head < num_heads else k_weight_ptr
        x *= scale * tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        y *= scale * tl.load(weight_ptr + HALF + cols, mask=mask, other=0.0).to(tl.float32)
        angle = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * 2 * HALF + cols
        cos = tl.load(angle, mask=mask, other=0.0)
        sin = tl.load(angle + HALF, mask=mask, other=0.0)
        rotated_first = x * cos - y * sin
        rotated_second = y * cos + x * sin
        if head < num_heads:
            target = q_out_ptr + (token * num_heads + head) * 2 * HALF + cols
            tl.store(target, rotated_first.to(q_out_ptr.dtype.element_ty), mask=mask)
            tl.store(target + HALF, rotated_second.to(q_out_ptr.dtype.element_ty), mask=mask)
        elif slot >= 0:
            target = k_cache_ptr + (slot * num_kv_heads + head - num_heads) * 2 * HALF + cols
            tl.store(target, rotated_first.to(k_cache_ptr.dtype.element_ty), mask=mask)
            tl.store(target + HALF, rotated_second.to(k_cache_ptr.dtype.element_ty), mask=mask)
