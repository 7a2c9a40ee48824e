"""Matrix in fp8 times one vector or two, with the small operations around it in the same kernel.

    y = W q(norm(x)) + b               norm (RMSNorm) and b are optional
    y = silu(W_gate q(norm(x)) + b_gate) * (W_up q(norm(x)) + b_up)
    y += W q(x) + b                    in place, the residual add

q rounds x to fp8 (see `quantization.fp8`). It is `kernels.gemv` for weights of half the bytes, and
what is said there holds here; but before x is rounded, its largest number must be known, and before
the norm its mean square. So each program goes through x twice: first all its threads share
the work, and then every warp rounds all of x for its own rows of the weight. Norm and rounding are
those of the kernels for more rows, to the last bit but for the order of a sum. Numbers are
multiplied and added up in float32.

Grid: (slice of the output). Bytes moved: the weights once. Bound by memory.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.activation import silu_times
from nanovllm.kernels.fp8_rows import scales_of, to_fp8
from nanovllm.kernels.launch import launch_dependents, pdl, prefer_shared_memory, wait
from nanovllm.quantization.fp8 import GROUP, Fp8Weight

MAX_ROWS = 2
_WARPS = 4
_LEAST = 256  # of a row, that a warp loads at once: 8 for each of its lanes
_MOST_X = 4096  # of x, looked through at once


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
    kernel = _fp8_gemv_kernel[(triton.cdiv(n, _WARPS * per_warp),)](
        x, values, scale, bias, norm_weight, y, eps, n, k,
        GATED=gated, ADD=add_to is not None, HAS_BIAS=bias is not None,
        HAS_NORM=norm_weight is not None, HAS_GROUPS=weight.has_groups, GROUP=GROUP,
        WARPS=_WARPS, ROWS=rows, PER_WARP=per_warp, BLOCKS=blocks, AHEAD=ahead,
        X_BLOCK=min(_MOST_X, triton.next_power_of_2(k)), num_warps=_WARPS, **pdl(x),
    )  # fmt: skip
    prefer_shared_memory(kernel)
    return y


def tiling(k: int, n: int, gated: bool) -> tuple[tuple[int, ...], int, int]:
    """Sizes of a row's blocks, how many are loaded ahead, and the outputs of a warp.

    A warp has 2 to 8 KiB under way. The more outputs it has, the less often x is rounded; but there
    must be programs for all multiprocessors.
    """
    has_many = n >= 4096 and (k > 3072 or (k <= 1024 and not gated))
    size = min(512 if gated and has_many else 1024, max(_LEAST, triton.next_power_of_2(k)))
    lengths = [min(size, k - start) for start in range(0, k, size)]
    blocks = tuple(max(_LEAST, triton.next_power_of_2(length)) for length in lengths)
    return blocks, min(2, len(blocks)), 4 if has_many else 2


@triton.jit
def _fp8_gemv_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, norm_ptr, y_ptr, eps, n, k: tl.constexpr,
    GATED: tl.constexpr, ADD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_GROUPS: tl.constexpr, GROUP: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr,
    PER_WARP: tl.constexpr, BLOCKS: tl.constexpr, AHEAD: tl.constexpr, X_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
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

    acc = tl.zeros([WARPS, ROWS, PER_WARP, 32], tl.float32)
    acc_up = tl.zeros([WARPS, ROWS, PER_WARP, 32], tl.float32)
    w, w_up = (), ()
    factor, scale, factor_1, scale_1 = 1.0, 1.0, 1.0, 1.0
    for i in tl.static_range(-AHEAD, len(BLOCKS)):
        if i + AHEAD < len(BLOCKS):
            start = (i + AHEAD) * BLOCKS[0]
            w += (_load(weights, start, k, out < n, BLOCKS[i + AHEAD], ".cg"),)
            if GATED:
                ups = weights + n.to(tl.int64) * k
                w_up += (_load(ups, start, k, out < n, BLOCKS[i + AHEAD], ".cg"),)
        if i == -1:
            wait(PDL)
            if HAS_NORM or not HAS_GROUPS:
                factor, scale = _row_factors(x_ptr, norm_ptr, eps, k, HAS_NORM, HAS_GROUPS, X_BLOCK)
                if ROWS == 2:
                    factor_1, scale_1 = _row_factors(
                        x_ptr + k, norm_ptr, eps, k, HAS_NORM, HAS_GROUPS, X_BLOCK
                    )
        if i >= 0:
            start = i * BLOCKS[0]
            x = _load(x_ptr + row * k, start + zero, k, True, BLOCKS[i], "").to(tl.float32)
            if HAS_NORM:
                g = _load(norm_ptr, start + zero, k, True, BLOCKS[i], "").to(tl.float32)
                # Powers of two may come first: they round nothing.
                x = _rounded_to(x * tl.where(row == 0, factor, factor_1) * g, x_ptr)
            elif not HAS_GROUPS:
                x *= tl.where(row == 0, factor, factor_1)
            if HAS_GROUPS:
                x, x_scale = _round_groups(x)
            else:
                x = to_fp8(x).to(tl.float32)
            sums = _multiply(w[i], x)
            if HAS_GROUPS:
                scale = _load_scales(scale_ptr, start, k, outputs, out, n, GROUP, BLOCKS[i])
                sums *= x_scale * scale
            acc += tl.sum(sums, axis=3)
            if GATED:
                sums = _multiply(w_up[i], x)
                if HAS_GROUPS:
                    scale = _load_scales(scale_ptr + n, start, k, outputs, out, n, GROUP, BLOCKS[i])
                    sums *= x_scale * scale
                acc_up += tl.sum(sums, axis=3)

    y = tl.sum(acc, axis=3)  # [warp, row of x, output of the warp]
    row = tl.arange(0, ROWS)[None, :, None]
    out = tl.arange(0, WARPS)[:, None, None] * PER_WARP + tl.arange(0, PER_WARP)[None, None, :]
    out += tl.program_id(0) * WARPS * PER_WARP
    if not HAS_GROUPS:
        x_scale = tl.where(row == 0, scale, scale_1)
        y *= x_scale * tl.load(scale_ptr + out, mask=out < n, other=0.0)
    elif HAS_NORM:  # what is NaN stays NaN: see `_rounded_to`
        y += tl.where(row == 0, factor - factor, factor_1 - factor_1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + out, mask=out < n, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(acc_up, axis=3)
        if not HAS_GROUPS:
            up *= x_scale * tl.load(scale_ptr + n + out, mask=out < n, other=0.0)
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
def _multiply(w, x):
    """What each lane adds up: [warp, row of x, output of the warp, K / 256, lane]."""
    products = w.to(tl.float32) * x
    W: tl.constexpr = products.shape[0]
    R: tl.constexpr = products.shape[1]
    P: tl.constexpr = products.shape[2]
    B: tl.constexpr = products.shape[3]
    return tl.sum(tl.reshape(products, [W, R, P, B, 32, 8]), axis=5)


@triton.jit
def _round_groups(x):
    """A tile of x as numbers of e4m3, and the scale of the group of each lane, [warp, row of x, 1,
    K / 256, lane]."""
    W: tl.constexpr = x.shape[0]
    R: tl.constexpr = x.shape[1]
    B: tl.constexpr = x.shape[3]
    x = tl.reshape(x, [W, R, 1, B, 2, 16, 8])
    scale, inverse = scales_of(tl.max(tl.max(tl.abs(x), axis=6), axis=5))
    x = to_fp8(x * tl.expand_dims(tl.expand_dims(inverse, 5), 6))
    scale = tl.broadcast_to(tl.expand_dims(scale, 5), [W, R, 1, B, 2, 16])
    return tl.reshape(x, [W, R, 1, B, 256]).to(tl.float32), tl.reshape(scale, [W, R, 1, B, 32])


@triton.jit
def _row_factors(
    x_ptr, norm_ptr, eps, k: tl.constexpr, HAS_NORM: tl.constexpr, HAS_GROUPS: tl.constexpr,
    X_BLOCK: tl.constexpr,
):  # fmt: skip
    """By which number a row is multiplied before it is rounded, and its scale after that."""
    col = tl.arange(0, X_BLOCK)
    largest = tl.zeros([X_BLOCK], tl.float32)
    squares = tl.zeros([X_BLOCK], tl.float32)
    for start in tl.static_range(0, k, X_BLOCK):
        inside = start + col < k
        x = tl.load(x_ptr + start + col, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x * x
            x *= tl.load(norm_ptr + start + col, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    if not HAS_NORM:
        scale, inverse = scales_of(tl.max(largest, axis=0))
        return inverse, scale
    total, most = tl.reduce((squares, largest), 0, _sum_and_max)
    # NaN if the mean square is not finite, or a number of the norm's weight.
    root = tl.rsqrt(total / k + eps) + (total - total) + (most - most)
    if HAS_GROUPS:
        return root, root
    scale, inverse = scales_of(_rounded_to(most * root, x_ptr))
    return root * inverse, scale + (root - root)  # what is NaN stays NaN: see `_rounded_to`


@triton.jit
def _rounded_to(x, ptr):
    """float32 numbers as those of a pointer would be. Of bfloat16 it is done by hand, as the
    hardware converts one in the time of eight additions; NaN may become zero."""
    if ptr.dtype.element_ty != tl.bfloat16:
        return x.to(ptr.dtype.element_ty).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _sum_and_max(sum_a, max_a, sum_b, max_b):
    return sum_a + sum_b, tl.maximum(max_a, max_b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load_scales(
    scale_ptr, start, k: tl.constexpr, outputs, out, n, GROUP: tl.constexpr, SIZE: tl.constexpr
):
    """Of the group of each lane: [warp, 1, output of the warp, K / 256, lane]."""
    at = start + tl.arange(0, SIZE // 256)[None, None, None, :, None] * 256
    at += tl.arange(0, 32)[None, None, None, None, :] * 8
    return tl.load(scale_ptr + at // GROUP * outputs + out, mask=(out < n) & (at < k), other=0)
