"""Matrix in fp8 times one vector or two, with the small operations around it in the same kernel.

    y = W q(norm(x)) + b               norm (RMSNorm) and b are optional
    y = silu(W_gate q(norm(x)) + b_gate) * (W_up q(norm(x)) + b_up)
    y += W q(x) + b                    in place, the residual add

q rounds x to fp8 (see `quantization.fp8`). It is `kernels.gemv` for weights of half the bytes, and
what is said there holds here; but x, to be rounded, needs the largest of its numbers first. So each
program goes through x twice: all its threads share the work of that, and of the rounding, and every
warp takes what it needs of the result. Norm and rounding are those of the kernels for more rows, to
the last bit but for the order of a sum. Numbers are multiplied and added up in float32.

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
_LEAST = 512  # of a row, that a warp loads at once: 16 bytes for each of its lanes
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
    blocks, ahead, per_warp = tiling(k, gated)
    kernel = _fp8_gemv_kernel[(triton.cdiv(n, _WARPS * per_warp),)](
        x, values, scale, bias, norm_weight, y, eps, n, k,
        GATED=gated, ADD=add_to is not None, HAS_BIAS=bias is not None,
        HAS_NORM=norm_weight is not None, HAS_GROUPS=weight.has_groups, GROUP=GROUP,
        WARPS=_WARPS, ROWS=rows, PER_WARP=per_warp, BLOCKS=blocks, AHEAD=ahead,
        X_BLOCK=min(_MOST_X, triton.next_power_of_2(k)), num_warps=_WARPS, **pdl(x),
    )  # fmt: skip
    prefer_shared_memory(kernel)
    return y


def tiling(k: int, gated: bool) -> tuple[tuple[int, ...], int, int]:
    """Sizes of a row's blocks, how many are loaded ahead, and the rows of the weight per warp."""
    matrices = 2 if gated else 1
    if k <= 2048:
        size, ahead = max(_LEAST, triton.next_power_of_2(k)), 1
        per_warp = max(1, 4096 // (size * matrices))
    else:
        size, ahead, per_warp = 2048, 2, 2 // matrices
    lengths = [min(size, k - start) for start in range(0, k, size)]
    return tuple(max(_LEAST, triton.next_power_of_2(n)) for n in lengths), ahead, per_warp


@triton.jit
def _fp8_gemv_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, norm_ptr, y_ptr, eps, n, k: tl.constexpr,
    GATED: tl.constexpr, ADD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_GROUPS: tl.constexpr, GROUP: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr,
    PER_WARP: tl.constexpr, BLOCKS: tl.constexpr, AHEAD: tl.constexpr, X_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    # Tiles are [warp, row of x, output of the warp, K / 512, 512]; the last is one 16-byte load of
    # each of a warp's 32 lanes. With the warps in front, the compiler gives each one whole rows.
    warp = tl.arange(0, WARPS)[:, None, None, None, None]
    out = tl.arange(0, PER_WARP)[None, None, :, None, None]
    out += (tl.program_id(0) * WARPS + warp) * PER_WARP
    weights = weight_ptr + out.to(tl.int64) * k
    outputs = n * 2 if GATED else n  # of the matrix

    # [warp, row of x, output of the warp, group of the lane, lane of the group]
    acc = tl.zeros([WARPS, ROWS, PER_WARP, 4, 8], tl.float32)
    acc_up = tl.zeros([WARPS, ROWS, PER_WARP, 4, 8], tl.float32)
    x_scale = tl.zeros([ROWS], tl.float32) + 1.0
    inverse, root = x_scale, x_scale
    w, w_up = (), ()
    for i in tl.static_range(-AHEAD, len(BLOCKS)):
        if i + AHEAD < len(BLOCKS):
            start = (i + AHEAD) * BLOCKS[0]
            w += (_load(weights, start, k, out < n, BLOCKS[i + AHEAD]),)
            if GATED:
                ups = weights + n.to(tl.int64) * k
                w_up += (_load(ups, start, k, out < n, BLOCKS[i + AHEAD]),)
        if i == -1:
            wait(PDL)
            if HAS_NORM or not HAS_GROUPS:
                root, largest = _look_through(x_ptr, norm_ptr, eps, k, HAS_NORM, ROWS, X_BLOCK)
                x_scale, inverse = scales_of(largest)
        if i >= 0:
            start = i * BLOCKS[0]
            x = _load_x(x_ptr, norm_ptr, root, start, k, HAS_NORM, ROWS, BLOCKS[i])
            x, group_scale = _round(x, inverse, HAS_GROUPS, GROUP, ROWS, BLOCKS[i])
            sums = _sums_of_lanes(w[i].to(tl.float32) * x)
            if HAS_GROUPS:
                scale = _load_scales(scale_ptr, start, k, outputs, out, n, GROUP, BLOCKS[i])
                sums *= group_scale * scale
            acc += tl.sum(sums, axis=3)
            if GATED:
                sums = _sums_of_lanes(w_up[i].to(tl.float32) * x)
                if HAS_GROUPS:
                    scale = _load_scales(scale_ptr + n, start, k, outputs, out, n, GROUP, BLOCKS[i])
                    sums *= group_scale * scale
                acc_up += tl.sum(sums, axis=3)

    y = tl.sum(tl.sum(acc, axis=4), axis=3)  # [warp, row of x, output of the warp]
    row = tl.arange(0, ROWS)[None, :, None]
    out = tl.arange(0, WARPS)[:, None, None] * PER_WARP + tl.arange(0, PER_WARP)[None, None, :]
    out += tl.program_id(0) * WARPS * PER_WARP
    if not HAS_GROUPS:
        x_scale = tl.reshape(x_scale, [1, ROWS, 1])
        y *= x_scale * tl.load(scale_ptr + out, mask=out < n, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + out, mask=out < n, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(tl.sum(acc_up, axis=4), axis=3)
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
def _load(rows_ptr, start, k: tl.constexpr, mask, SIZE: tl.constexpr):
    lane = tl.arange(0, 512)[None, None, None, None, :]
    at = start + tl.arange(0, SIZE // 512)[None, None, None, :, None] * 512 + lane
    return tl.load(rows_ptr + at, mask=mask & (at < k), other=0.0, cache_modifier=".cg")


@triton.jit
def _round(
    x, inverse, HAS_GROUPS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """[1, ROWS, 1, SIZE / 512, 512] numbers of e4m3, and the scales of groups,
    [1, ROWS, 1, SIZE / 512, 4, 1]."""
    scale = inverse
    if HAS_GROUPS:
        x = tl.reshape(x, [ROWS, SIZE // GROUP, GROUP])
        scale, inverse = scales_of(tl.max(tl.abs(x), axis=2))
        x = tl.reshape(x * inverse[:, :, None], [ROWS, SIZE])
        scale = tl.reshape(scale, [1, ROWS, 1, SIZE // 512, 4, 1])
    else:
        x *= inverse[:, None]
    return tl.reshape(to_fp8(x), [1, ROWS, 1, SIZE // 512, 512]).to(tl.float32), scale


@triton.jit
def _load_scales(
    scale_ptr, start, k: tl.constexpr, outputs, out, n, GROUP: tl.constexpr, SIZE: tl.constexpr
):
    """[warp, 1, output of the warp, K / 512, group, 1]"""
    out = tl.expand_dims(out, 5)
    group = start // GROUP + tl.arange(0, SIZE // 512)[None, None, None, :, None, None] * 4
    group += tl.arange(0, 4)[None, None, None, None, :, None]
    return tl.load(scale_ptr + group * outputs + out, mask=(out < n) & (group * GROUP < k), other=0)


@triton.jit
def _sums_of_lanes(products):
    """[warp, row of x, output of the warp, K / 512, group, lane of the group]"""
    W: tl.constexpr = products.shape[0]
    R: tl.constexpr = products.shape[1]
    P: tl.constexpr = products.shape[2]
    B: tl.constexpr = products.shape[3]
    return tl.sum(tl.reshape(products, [W, R, P, B, 4, 8, 16]), axis=6)


@triton.jit
def _look_through(
    x_ptr, norm_ptr, eps, k: tl.constexpr, HAS_NORM: tl.constexpr, ROWS: tl.constexpr,
    X_BLOCK: tl.constexpr,
):  # fmt: skip
    """By which number a norm multiplies rows, and the largest of their numbers after it."""
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, X_BLOCK)[None, :]
    largest = tl.zeros([ROWS, X_BLOCK], tl.float32)
    squares = tl.zeros([ROWS, X_BLOCK], tl.float32)
    for start in tl.static_range(0, k, X_BLOCK):
        inside = start + col < k
        x = tl.load(x_ptr + row * k + start + col, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x * x
            x *= tl.load(norm_ptr + start + col, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    largest = tl.max(largest, axis=1)
    root = tl.rsqrt(tl.sum(squares, axis=1) / k + eps) if HAS_NORM else largest
    if HAS_NORM:
        largest = (largest * root).to(x_ptr.dtype.element_ty).to(tl.float32)
    return root, largest


@triton.jit
def _load_x(
    x_ptr, norm_ptr, root, start, k: tl.constexpr, HAS_NORM: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """[ROWS, SIZE] float32, as the norm leaves it."""
    col = start + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * k + col, mask=col < k, other=0.0)
    x = x.to(tl.float32)
    if HAS_NORM:
        g = tl.load(norm_ptr + col, mask=col < k, other=0.0).to(tl.float32)
        x = (x * root[:, None] * g).to(x_ptr.dtype.element_ty).to(tl.float32)
    return x
