"""Attention over the paged KV cache in plain torch, sequence by sequence: what runs anywhere, and
what the kernels, and the loops for a CPU, are compared with."""

import torch
import torch.nn.functional as F

from nanovllm.layers.layernorm import ROWS_AT_A_TIME
from nanovllm.layers.rotary_embedding import rotate_

_MASK_VALUES = 2**24
_LARGEST_FP8 = 448.0


def norm_rope_store(
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
    """Queries ready for attention, [tokens, num_heads, head_dim]; keys and values are stored in the
    cache. The arguments are those of `kernels.qk_norm_rope_store`."""
    per_token = (qkv, cos_sin[positions], slot_mapping.long())
    pieces = [
        _norm_rope_store(x, rotations, slots, q_weight, k_weight, eps, k_cache, v_cache, kv_scales)
        for x, rotations, slots in zip(*(each.split(ROWS_AT_A_TIME) for each in per_token))
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _norm_rope_store(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    slots: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_scales: torch.Tensor | None,
) -> torch.Tensor:
    """The same of some tokens; `cos_sin` [tokens, head_dim] are those of their positions."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    qk, v = heads.split([num_heads + num_kv_heads, num_kv_heads], dim=1)
    if q_weight is not None and k_weight is not None:
        rotated = F.rms_norm(qk.float(), (head_dim,), eps=eps)
        rotated[:, :num_heads].mul_(q_weight)
        rotated[:, num_heads:].mul_(k_weight)
    else:
        rotated = qk.to(torch.float32, copy=True)  # it is rotated in place
    rotate_(rotated, cos_sin.unsqueeze(1))
    q, k = rotated.split([num_heads, num_kv_heads], dim=1)
    q = q.to(qkv.dtype)
    if kv_scales is None:
        k = k.to(qkv.dtype)
    else:
        k, v = (in_fp8(x, own) for x, own in zip((k, v), kv_scales, strict=True))
    if slots.min() < 0:
        k, v, slots = k[slots >= 0], v[slots >= 0], slots[slots >= 0]
    for cache, new in ((k_cache, k), (v_cache, v)):
        stored = cache.view(-1, num_kv_heads, head_dim)
        if kv_scales is None:
            stored[slots] = new
        else:
            stored.view(torch.uint8)[slots] = new.view(torch.uint8)
    return q


def in_fp8(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x / scale in e4m3, rounded to the nearest and no larger than 448: [tokens, heads, head_dim].

    Args:
        scales: [heads] float32.
    """
    divided = x.float() / scales[:, None]
    return divided.clamp(-_LARGEST_FP8, _LARGEST_FP8).to(torch.float8_e4m3fn)


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of ragged prompts, like `q` [tokens, num_heads, head_dim]; the arguments are
    those of `kernels.paged_prefill`."""
    out = torch.empty_like(q)
    starts, tables = cu_seqlens_q.tolist(), block_tables.tolist()
    caches = _with_scales(k_cache, v_cache, kv_scales)
    for row, context_len in enumerate(context_lens.tolist()):
        start, end = starts[row], starts[row + 1]
        k, v = (_gather(one, tables[row], context_len, own, q.dtype) for one, own in caches)
        num_before = context_len - (end - start)
        # A mask is as wide as the context: it is made for some of the queries at a time.
        size = max(1, _MASK_VALUES // context_len if num_before else end - start)
        for first in range(start, end, size):
            last = min(first + size, end)
            num_seen = num_before + last - start
            mask = None
            if num_before:
                mask = torch.ones(last - first, num_seen, dtype=torch.bool, device=q.device)
                mask = mask.tril(diagonal=num_before + first - start)
            attended = F.scaled_dot_product_attention(
                q[first:last].transpose(0, 1)[None], k[None, :, :num_seen], v[None, :, :num_seen],
                attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True,
            )  # fmt: skip
            out[first:last] = attended[0].transpose(0, 1)
    return out


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query a sequence to its context, like `q` [rows, num_heads, head_dim]. A
    context of 0 marks a padding row, whose output is zero."""
    out = torch.zeros_like(q)
    num_kv_heads, head_dim = k_cache.shape[2:]
    # The heads of a group are the queries of one head, so that each key is read once.
    groups = q.view(q.shape[0], num_kv_heads, -1, head_dim)
    tables = block_tables.tolist()
    caches = _with_scales(k_cache, v_cache, kv_scales)
    for row, context_len in enumerate(context_lens.tolist()):
        if context_len:
            k, v = (_gather(one, tables[row], context_len, own, q.dtype) for one, own in caches)
            attended = F.scaled_dot_product_attention(
                groups[row][None], k[None], v[None], scale=scale
            )
            out[row] = attended.reshape(-1, head_dim)
    return out


def _with_scales(
    k_cache: torch.Tensor, v_cache: torch.Tensor, kv_scales: torch.Tensor | None
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    k_scales, v_scales = (None, None) if kv_scales is None else kv_scales
    return [(k_cache, k_scales), (v_cache, v_scales)]


def _gather(
    cache: torch.Tensor,
    block_table: list[int],
    context_len: int,
    scales: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """One sequence's keys or values, [num_kv_heads, context_len, head_dim]; those of a cache in fp8
    times `scales` [num_kv_heads], in `dtype`. Consecutive blocks are not copied: see
    `engine.kv_cache.allocate_kv_cache`."""
    num_blocks = -(-context_len // cache.shape[1])
    stored = cache if scales is None else cache.view(torch.uint8)  # torch indexes no fp8
    by_head = stored.permute(2, 0, 1, 3)
    first, table = block_table[0], block_table[:num_blocks]
    if table == [*range(first, first + num_blocks)]:
        blocks = by_head[:, first : first + num_blocks]
    else:
        blocks = by_head.index_select(1, torch.tensor(table, device=cache.device))
    tokens = blocks.flatten(1, 2)[:, :context_len]
    if scales is not None:
        tokens = (tokens.view(torch.float8_e4m3fn).float() * scales[:, None, None]).to(dtype)
    return tokens
