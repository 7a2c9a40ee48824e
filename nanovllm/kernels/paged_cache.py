"""What the kernels around attention know of the paged KV cache.

It holds keys and values as they are, or in fp8 (e4m3, Micikevicius et al. 2022, arXiv:2209.05433)
divided by a scale of their kv head. Then tiles are widened to float16 as they are read, which has
every value of e4m3, and the scales are applied to scores and results.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634  # exp(x) = 2 ** (x * LOG2_E)
MAX_HEAD_DIM = 256
_TRITON_TYPES = {
    torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16
}  # fmt: skip


def tile_tokens(block_size: int, head_dim: int, limit: int = 64) -> int:
    """Tokens of a tile of prefill: the largest power of two that divides the block size, within
    limits. (Those of decode may go from block to block: see `decode_plan`.)

    Tiles of 64 tokens and heads of 256 would take 138 to 224 KiB of shared memory; with 32 (and in
    prefill one stage less), all kernels fit into the 99 KiB that consumer GPUs give a program.
    """
    limit = min(limit, 64 if head_dim <= 128 else 32)
    return max(16, min(limit, block_size & -block_size))


def dot_type(dtype: torch.dtype, cache: torch.Tensor) -> tl.dtype:
    """In what type keys and values of a cache are multiplied, in a model of some dtype."""
    in_fp8 = cache.dtype == torch.float8_e4m3fn
    return _TRITON_TYPES[torch.float16 if in_fp8 and dtype.itemsize == 2 else dtype]


@triton.jit
def load_slots(slots_ptr, TILE: tl.constexpr, SPANS: tl.constexpr):
    """Where the spans of a tile begin in the cache: a number, or of several spans [TILE, 1], for
    each token that of its own."""
    if SPANS == 1:
        slots = tl.load(slots_ptr)
    else:
        slots = tl.load(slots_ptr + tl.arange(0, TILE) // (TILE // SPANS))[:, None]
    return slots


@triton.jit
def as_stored(x, scale, dtype: tl.constexpr):
    """float32 values as the cache holds them. In e4m3 they are divided by the scale, rounded to the
    nearest, ties to even, and no larger than 448."""
    if dtype != tl.float8e4nv:
        return x.to(dtype)
    x = tl.clamp(tl.div_rn(x, scale), -448.0, 448.0)
    # Rounded here to 3 bits after the point: Triton's interpreter loses the carry.
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    smallest: tl.constexpr = 2.0**-9
    to_integer: tl.constexpr = 12582912.0  # 1.5 * 2^23: what is added to it is rounded
    below = (x * 512.0 + to_integer - to_integer) * smallest  # of a subnormal number
    return tl.where(tl.abs(x) < 2.0**-6, below, bits.to(tl.float32, bitcast=True)).to(dtype)
