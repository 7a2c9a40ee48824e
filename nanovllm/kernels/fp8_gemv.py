"""Matrix in fp8 times one vector or two, with the small operations around it in the same kernel.

    y = W q(norm(x)) + b               norm (RMSNorm) and b are optional
    y = silu(W_gate q(norm(x)) + b_gate) * (W_up q(norm(x)) + b_up)
    y += W q(x) + b                    in place, the residual add

It is `kernels.gemv` for weights of half the bytes, and what is said there holds here. q rounds x to
fp8 (see `quantization.fp8`). As its scales are powers of two, that is to keep four binary digits of
each number; so it is done without them, for which all of x would have to be known first. (Numbers
below 2^-14 of a row's largest, of which e4m3 has fewer digits, keep four here too.) The norm comes
before, and is that of the kernels for more rows, to the last bit but for the order of a sum.
Numbers are multiplied and added up in float32.

Every warp rounds x for its own rows of the weight: it pays for weights that are small. Larger ones
take longer here than by `kernels.split_k` (see docs/performance.md).

Grid: (slice of the output). Bytes moved: the weights once. Bound by memory, and by the instructions
that widen and round.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.activation import silu_times
from nanovllm.kernels.launch import (
    cdiv,
    launch_dependents,
    next_power_of_2,
    pdl,
    prefer_shared_memory,
    wait,
)
from nanovllm.quantization.fp8 import GROUP, Fp8Weight

MAX_ROWS = 2
_WARPS = 4
_LEAST, _MOST = 256, 1024  # numbers of a row in a block; a lane of a warp loads 8 at once


def fp8_gemv(
    x: torch.Tensor,
    weight: Fp8Weight,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """W q(x) + b, with what comes before and after it.

    Args:
        x: [rows, in], `MAX_ROWS` rows at most.
        weight: [out, in]; with `gated` [2 * out, in], gate then up.
        bias, norm_weight, eps, gated, add_to, out: as those of `gemv`.

    Returns:
        [rows, out], in the dtype of x; `add_to` or `out` if given.
    """
    rows, k = x.shape
    values, scale = weight
    n = values.shape[0] // 2 if gated else values.shape[0]
    y = add_to if add_to is not None else out
    if y is None:
        y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    blocks, ahead, per_warp = tiling(k, n, gated)
    kernel = _fp8_gemv_kernel[(cdiv(n, _WARPS * per_warp),)](
        x, values, scale, bias, norm_weight, y, eps, n, k,
        GATED=gated, ADD=add_to is not None, HAS_BIAS=bias is not None,
        HAS_NORM=norm_weight is not None, HAS_GROUPS=weight.has_groups, GROUP=GROUP,
        WARPS=_WARPS, ROWS=rows, PER_WARP=per_warp, BLOCKS=blocks, AHEAD=ahead,
        num_warps=_WARPS, **pdl(x),
    )  # fmt: skip
    prefer_shared_memory(kernel)
    return y


def tiling(k: int, n: int, gated: bool) -> tuple[tuple[int, ...], int, int]:
    """Sizes of a row's blocks, how many are loaded ahead, and the outputs of a warp."""
    size = min(_MOST, max(_LEAST, next_power_of_2(k)))
    lengths = [min(size, k - start) for start in range(0, k, size)]
    blocks = tuple(max(_LEAST, next_power_of_2(length)) for length in lengths)
    has_four = k <= 1024 and n >= 4096  # of longer rows, registers spill
    return blocks, min(3, len(blocks)), 1 if gated else 4 if has_four else 2


@triton.jit
def _fp8_gemv_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, norm_ptr, y_ptr, eps, n, k: tl.constexpr,
    GATED: tl.constexpr, ADD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_GROUPS: tl.constexpr, GROUP: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr,
    PER_WARP: tl.constexpr, BLOCKS: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    # Tiles are [warp, row of x, output of the warp, K / 256, 256]; of the last, each of a warp's 32
    # lanes loads 8 numbers, 16 bytes of x and 8 of the weight: were they 16 of each, what a lane
    # has would have to be sorted. With the warps in front, each one gets whole rows.
    warp = tl.arange(0, WARPS)[:, None, None, None, None]
    row = tl.arange(0, ROWS)[None, :, None, None, None]
    out = tl.arange(0, PER_WARP)[None, None, :, None, None]
    out += (tl.program_id(0) * WARPS + warp) * PER_WARP
    weights = weight_ptr + out.to(tl.int64) * k
    outputs = n * 2 if GATED else n  # of the matrix
    zero = warp * 0  # x and g are the same for every warp, but laid out like the weights
    xs = x_ptr + row * k + zero

    acc = tl.zeros([WARPS, ROWS, PER_WARP, 32], tl.float32)
    acc_up = tl.zeros([WARPS, ROWS, PER_WARP, 32], tl.float32)
    w, w_up, g, x = (), (), (), ()
    root = 1.0
    for i in tl.static_range(-AHEAD, len(BLOCKS)):
        if i + AHEAD < len(BLOCKS):
            start = (i + AHEAD) * BLOCKS[0]
            w += (_load(weights, start, k, out < n, BLOCKS[i + AHEAD], ".cg"),)
            if GATED:
                ups = weights + n.to(tl.int64) * k
                w_up += (_load(ups, start, k, out < n, BLOCKS[i + AHEAD], ".cg"),)
            if HAS_NORM:
                g += (_load(norm_ptr, start + zero, k, True, BLOCKS[i + AHEAD], ""),)
        if i == -1:
            wait(PDL)
            if HAS_NORM:
                root = _inverse_root(xs, eps, k, WARPS, ROWS, BLOCKS)
            for j in tl.static_range(AHEAD):
                x += (_load(xs, j * BLOCKS[0], k, True, BLOCKS[j], ""),)
        if i >= 0:
            start = i * BLOCKS[0]
            if i + AHEAD < len(BLOCKS):
                ahead = (i + AHEAD) * BLOCKS[0]
                x += (_load(xs, ahead, k, True, BLOCKS[i + AHEAD], ""),)
            x_block = x[i].to(tl.float32)  # type: ignore[var-annotated]
            if HAS_NORM:
                x_block = _rounded_to(x_block * root * g[i].to(tl.float32), x_ptr)
            x_block = _with_digits(x_block, 4)
            sums = _of_lanes(w[i].to(tl.float32) * x_block)
            if HAS_GROUPS:
                sums *= _load_scales(scale_ptr, start, k, outputs, out, n, GROUP, BLOCKS[i])
            acc += tl.sum(sums, axis=3)
            if GATED:
                sums = _of_lanes(w_up[i].to(tl.float32) * x_block)
                if HAS_GROUPS:
                    sums *= _load_scales(scale_ptr + n, start, k, outputs, out, n, GROUP, BLOCKS[i])
                acc_up += tl.sum(sums, axis=3)

    y = tl.sum(acc, axis=3)  # [warp, row of x, output of the warp]
    row = tl.arange(0, ROWS)[None, :, None]
    out = tl.arange(0, WARPS)[:, None, None] * PER_WARP + tl.arange(0, PER_WARP)[None, None, :]
    out += tl.program_id(0) * WARPS * PER_WARP
    if not HAS_GROUPS:
        y *= tl.load(scale_ptr + out, mask=out < n, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + out, mask=out < n, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(acc_up, axis=3)
        if not HAS_GROUPS:
            up *= tl.load(scale_ptr + n + out, mask=out < n, other=0.0)
        if HAS_BIAS:
            up += tl.load(bias_ptr + n + out, mask=out < n, other=0.0).to(tl.float32)
        y = silu_times(y, up)
    target = y_ptr + row * n + out
    if ADD:
        y += tl.load(target, mask=out < n, other=0.0).to(tl.float32)
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=out < n)


@triton.jit
def _load(rows_ptr, start, k: tl.constexpr, mask, SIZE: tl.constexpr, CACHE: tl.constexpr):
    i = tl.arange(0, 256)[None, None, None, None, :]
    i = i // 8 * 8 + i % 8  # the compiler sees no more than 8 side by side
    at = start + tl.arange(0, SIZE // 256)[None, None, None, :, None] * 256 + i
    return tl.load(rows_ptr + at, mask=mask & (at < k), other=0.0, cache_modifier=CACHE)


@triton.jit
def _of_lanes(products):
    """What each lane adds up: [warp, row of x, output of the warp, K / 256, lane]."""
    W: tl.constexpr = products.shape[0]
    R: tl.constexpr = products.shape[1]
    P: tl.constexpr = products.shape[2]
    B: tl.constexpr = products.shape[3]
    return tl.sum(tl.reshape(products, [W, R, P, B, 32, 8]), axis=5)


@triton.jit
def _inverse_root(
    xs, eps, k: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr
):
    """1 / sqrt(mean(x^2) + eps): [warp, row of x, 1, 1, 1]."""
    squares = tl.zeros([WARPS, ROWS, 1, 1, 32], tl.float32)
    for i in tl.static_range(len(BLOCKS)):
        x = _load(xs, i * BLOCKS[0], k, True, BLOCKS[i], "").to(tl.float32)
        squares += tl.sum(_of_lanes(x * x), axis=3, keep_dims=True)
    return tl.rsqrt(tl.sum(squares, axis=4, keep_dims=True) / k + eps)


@triton.jit
def _rounded_to(x, ptr):
    """float32 numbers as those of a pointer would be. Of bfloat16 it is done by hand, as the
    hardware converts one in the time of eight additions."""
    if ptr.dtype.element_ty == tl.bfloat16:
        return _with_digits(x, 8)
    return x.to(ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _with_digits(x, DIGITS: tl.constexpr):
    """float32 numbers of up to 2^104 rounded to so many binary digits, ties to even: the high part
    of Veltkamp's splitting (Dekker 1971, doi:10.1007/BF01397083). As the factor is a power of two,
    it does not matter whether the compiler fuses the product with the sum."""
    factor: tl.constexpr = 2.0 ** (24 - DIGITS)
    shifted = x * factor + x
    return shifted - (shifted - x)


@triton.jit
def _load_scales(
    scale_ptr, start, k: tl.constexpr, outputs, out, n, GROUP: tl.constexpr, SIZE: tl.constexpr
):
    """Of the group of each lane: [warp, 1, output of the warp, K / 256, lane]."""
    at = start + tl.arange(0, SIZE // 256)[None, None, None, :, None] * 256
    at += tl.arange(0, 32)[None, None, None, None, :] * 8
    return tl.load(scale_ptr + at // GROUP * outputs + out, mask=(out < n) & (at < k), other=0)
