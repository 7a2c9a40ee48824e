"""Values of a KV cache on their way into a product of attention, as they are or in fp8.

A product's matrix instructions want pairs of tokens side by side, and a cache has dimensions side
by side. For 16-bit values the hardware turns a tile as it loads it; of fp8 each byte would have to
be loaded alone. So values in fp8 are loaded as words of four dimensions, and a tile gives four
products, each of one byte of every word: `PARTS` of them, of every fourth dimension.

What is summed up is then a tuple of parts, [queries, head_dim / PARTS] float32 each.
"""

import torch
import triton
import triton.language as tl

_WORD = 4  # numbers of fp8 in 32 bits
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Of the words of two tokens, byte by byte: (first, second) in float16.
_WIDEN = tl.constexpr("""{
    .reg .b32 pairs;
    .reg .b16 low, high;
    prmt.b32 pairs, $4, $5, 0x5140;
    mov.b32 {low, high}, pairs;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
    prmt.b32 pairs, $4, $5, 0x7362;
    mov.b32 {low, high}, pairs;
    cvt.rn.f16x2.e4m3x2 $2, low;
    cvt.rn.f16x2.e4m3x2 $3, high;
}""")


def value_words(v_cache: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The cache as kernels load it, and in how many parts: fp8 as int32 words, if that serves."""
    head_dim = v_cache.shape[-1]
    if v_cache.dtype != torch.float8_e4m3fn or head_dim < 64 or head_dim % _WORD:
        return v_cache, 1
    return v_cache.view(torch.int32), _WORD


@triton.jit
def no_values(QUERIES: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr):
    """Sums of nothing."""
    sums = ()
    for _ in tl.static_range(PARTS):
        sums += (tl.zeros([QUERIES, BLOCK_D // PARTS], tl.float32),)
    return sums


@triton.jit
def dims_of_part(part: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr):
    """The dimensions of a part: [BLOCK_D / PARTS]."""
    return tl.arange(0, BLOCK_D // PARTS) * PARTS + part


@triton.jit
def scaled_values(sums, factor):
    """Each part times `factor`, [queries, 1] or a number."""
    scaled = ()
    for part in tl.static_range(len(sums)):
        scaled += (sums[part] * factor,)
    return scaled


@triton.jit
def values_unless(condition, sums):
    """Sums of nothing where a condition holds."""
    kept = ()
    for part in tl.static_range(len(sums)):
        kept += (tl.where(condition, 0.0, sums[part]),)
    return kept


@triton.jit
def add_values(sums, weights, tile, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Add the values of a tile by their weights.

    Args:
        weights: [queries, tokens], of DTYPE.
        tile: [tokens, head_dim / PARTS], from what `value_words` returns.
    """
    parts = (tile,) if len(sums) == 1 else _widened(tile)
    added = ()
    for part in tl.static_range(len(sums)):
        values = parts[part].to(DTYPE)
        added += (tl.dot(weights, values, sums[part], input_precision=PRECISION),)
    return added


@triton.jit
def _widened(words):
    """The four bytes of words, float16."""
    if not _INTERPRETED:
        return tl.inline_asm_elementwise(
            _WIDEN, "=r,=r,=r,=r,r,r", [words], (tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=2,
        )  # fmt: skip
    parts = ()
    for part in tl.static_range(4):
        byte = ((words >> (8 * part)) & 0xFF).to(tl.uint8)
        parts += (byte.to(tl.float8e4nv, bitcast=True).to(tl.float16),)
    return parts
