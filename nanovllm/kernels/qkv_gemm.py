"""The q/k/v product of many tokens, and all that comes between it and attention, in one kernel.

    [q | k | v] = x W^T, then QK-norm, RoPE and the way into the KV cache, as in `rope_store`

A tile is some tokens times whole heads, so that a program holds all that the norm of a head and its
rotation need: what `rope_store` reads and writes besides, twice the product, is never moved. The
product is rounded to the dtype of x before the norm, as if it had been stored.

Grid: a tile each, two programs on a multiprocessor: one finishes its tile beside the products of
the other. Tiles that run at a time share rows of x and heads of W, which so stay in the L2 cache.
Bound by arithmetic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels.launch import cdiv, gpu_with, launch_dependents, pdl, wait

MIN_ROWS = 2048
HEAD_DIMS = (64, 128)


class Tiling(NamedTuple):
    """Sizes of a program.

    Attributes:
        tokens, outputs: of a tile.
        block_k: inputs at a time.
        group: rows of tiles that run at a time.
        per_sm: programs of a multiprocessor that make all tiles one by one; None: a program each.
    """

    tokens: int = 128
    outputs: int = 128
    block_k: int = 64
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3
    per_sm: int | None = None


TILING = Tiling()


def qkv_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    tiling: Tiling = TILING,
) -> torch.Tensor:
    """Queries ready for attention; keys and values stored in the cache, in place.

    Args:
        x: [tokens, in]; `in` is a multiple of 8.
        weight: [(num_heads + 2 * num_kv_heads) * head_dim, in].

    The others are those of `qk_norm_rope_store`; the cache is in the dtype of x, and a tile must
    have whole heads, all of queries, keys or values.

    Returns:
        [tokens, num_heads, head_dim], in the dtype of x.
    """
    (tokens, k), (num_kv_heads, head_dim) = x.shape, k_cache.shape[-2:]
    num_heads = weight.shape[0] // head_dim - 2 * num_kv_heads
    q_out = torch.empty(tokens, num_heads, head_dim, dtype=x.dtype, device=x.device)
    tiles = cdiv(tokens, tiling.tokens) * cdiv(weight.shape[0], tiling.outputs)
    programs = tiles
    if tiling.per_sm is not None:
        gpu = gpu_with(x)
        programs = min(tiles, tiling.per_sm * (gpu.num_sms if gpu else 4))
    _qkv_gemm_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [tiling.tokens, tiling.block_k]),
        TensorDescriptor.from_tensor(weight, [tiling.outputs, tiling.block_k]),
        q_weight, k_weight, eps, cos_sin, positions, q_out, k_cache, v_cache, slot_mapping,
        tokens, k, num_heads, num_kv_heads, head_dim, HAS_NORM=q_weight is not None,
        ROWS=tiling.tokens, OUTPUTS=tiling.outputs, BLOCK_K=tiling.block_k, GROUP=tiling.group,
        PERSISTENT=tiling.per_sm is not None,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, **pdl(x),
    )  # fmt: skip
    return q_out


@triton.jit(do_not_specialize=["tokens"])
def _qkv_gemm_kernel(
    x_desc, weight_desc, q_weight_ptr, k_weight_ptr, eps, cos_sin_ptr, positions_ptr,
    q_out_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, tokens, k: tl.constexpr,
    num_heads: tl.constexpr, num_kv_heads: tl.constexpr, head_dim: tl.constexpr,
    HAS_NORM: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PERSISTENT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = OUTPUTS // head_dim
    tiles_across: tl.constexpr = (num_heads + 2 * num_kv_heads) // HEADS
    tiles_down = tl.cdiv(tokens, ROWS)
    wait(PDL)
    if PERSISTENT:
        # Flattened to one loop: the next tile's loads begin before this one is stored.
        for tile in tl.range(
            tl.program_id(0), tiles_down * tiles_across, tl.num_programs(0), flatten=True
        ):
            down, across = _tile_at(tile, tiles_down, tiles_across, GROUP)
            heads = _product(x_desc, weight_desc, down, across, k, ROWS, OUTPUTS, BLOCK_K)
            _finish(
                heads.to(q_out_ptr.dtype.element_ty), down * ROWS, across * HEADS,
                q_weight_ptr, k_weight_ptr, eps, cos_sin_ptr, positions_ptr,
                q_out_ptr, k_cache_ptr, v_cache_ptr, slots_ptr,
                tokens, num_heads, num_kv_heads, head_dim, HAS_NORM,
            )  # fmt: skip
        launch_dependents(PDL)
    else:
        down, across = _tile_at(tl.program_id(0), tiles_down, tiles_across, GROUP)
        heads = _product(x_desc, weight_desc, down, across, k, ROWS, OUTPUTS, BLOCK_K)
        launch_dependents(PDL)  # not before: they would take room
        _finish(
            heads.to(q_out_ptr.dtype.element_ty), down * ROWS, across * HEADS,
            q_weight_ptr, k_weight_ptr, eps, cos_sin_ptr, positions_ptr,
            q_out_ptr, k_cache_ptr, v_cache_ptr, slots_ptr,
            tokens, num_heads, num_kv_heads, head_dim, HAS_NORM,
        )  # fmt: skip


@triton.jit
def _tile_at(tile, tiles_down, tiles_across: tl.constexpr, GROUP: tl.constexpr):
    """Where a tile lies: GROUP rows of tiles at a time, column by column."""
    in_group: tl.constexpr = GROUP * tiles_across
    first = tile // in_group * GROUP
    height = tl.minimum(tiles_down - first, GROUP)
    place = tile % in_group
    return first + place % height, place // height


@triton.jit
def _product(
    x_desc, weight_desc, down, across, k: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of x W^T: [ROWS, OUTPUTS] float32."""
    acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in tl.range(0, k, BLOCK_K):  # past the end of a tensor there are zeros
        x = x_desc.load([down * ROWS, start])
        acc = tl.dot(x, tl.trans(weight_desc.load([across * OUTPUTS, start])), acc)
    return acc


@triton.jit
def _finish(
    heads, first_token, first_head, q_weight_ptr, k_weight_ptr, eps, cos_sin_ptr, positions_ptr,
    q_out_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, tokens, num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr, head_dim: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Norm, rotation and store of a tile [tokens, heads * head_dim]: all queries, keys or values.

    Half of the tokens at a time: there are not the registers for all. The norm's scale of a head
    comes last, so that the compiler moves the product between threads while it has 16 bits.
    """
    HALF: tl.constexpr = head_dim // 2
    TOKENS: tl.constexpr = heads.shape[0] // 2
    HEADS: tl.constexpr = heads.shape[1] // head_dim
    ROWS: tl.constexpr = TOKENS * HEADS  # a head of a token each
    parts = heads.reshape(2, TOKENS, HEADS * head_dim).permute(1, 2, 0).split()
    is_query, is_value = first_head < num_heads, first_head >= num_heads + num_kv_heads
    out_ptr = q_out_ptr if is_query else (v_cache_ptr if is_value else k_cache_ptr)
    height = num_heads if is_query else num_kv_heads
    first_head -= 0 if is_query else (num_heads + num_kv_heads if is_value else num_heads)
    row, dims = tl.arange(0, ROWS), tl.arange(0, HALF)
    for part in tl.static_range(2):
        halves = parts[part].reshape(TOKENS, HEADS, 2, HALF).permute(0, 1, 3, 2)
        lower, upper = halves.reshape(ROWS, HALF, 2).split()
        token = first_token + part * TOKENS + row // HEADS
        real = token < tokens
        slot = tl.load(slots_ptr + token, mask=real & (not is_query), other=-1)
        place = tl.where(is_query & real, token, slot).to(tl.int64)
        if not is_value:
            position = tl.load(positions_ptr + token, mask=real, other=0).to(tl.int64)
            angles = cos_sin_ptr + position[:, None] * head_dim + dims[None, :]
            cos, sin = tl.load(angles), tl.load(angles + HALF)
            x, y = lower.to(tl.float32), upper.to(tl.float32)
            if HAS_NORM:
                weight_ptr = q_weight_ptr if is_query else k_weight_ptr
                scale = tl.rsqrt(tl.sum(x * x + y * y, axis=1) / head_dim + eps)[:, None]
                x *= tl.load(weight_ptr + dims).to(tl.float32)[None, :]
                y *= tl.load(weight_ptr + HALF + dims).to(tl.float32)[None, :]
            x, y = x * cos - y * sin, y * cos + x * sin
            if HAS_NORM:
                x, y = x * scale, y * scale
            lower, upper = x.to(lower.dtype), y.to(upper.dtype)
        cells = (place * height + first_head + row % HEADS)[:, None] * head_dim + dims[None, :]
        mask = place[:, None] >= 0
        tl.store(out_ptr + cells, lower, mask=mask)
        tl.store(out_ptr + cells + HALF, upper, mask=mask)
