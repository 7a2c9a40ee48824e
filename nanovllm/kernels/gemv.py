"""Matrix times one vector or two, with the small operations around it in the same kernel.

    y = W norm(x) + b                  norm (RMSNorm) and b are optional
    y = silu(W_gate norm(x) + b_gate) * (W_up norm(x) + b_up)
    y += W x + b                       in place, the residual add

For the one or two rows of a tiny decode batch a matrix product is the reading of its weights, and
the gaps between many small kernels cost as much again. Here the norm is `(W (x * g)) * rsqrt(mean
x^2 + eps)`, which needs x once; each warp owns whole rows of the weight, so that every thread has
many 16-byte loads under way, and there is one reduction, nothing split over programs, no atomics:
results are deterministic. A row is read in blocks, always `AHEAD` of them before they are used; the
first are under way before the wait for the kernel that makes x. Weights, used once, go past the
first-level cache, which is left to x and to the norm's weights.

Grid: (slice of the output). Bytes moved: the weights once. Bound by memory.
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

MAX_ROWS = 2
_WARPS = 4


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """W x + b, with what comes before and after it.

    Args:
        x: [rows, in], `MAX_ROWS` rows at most.
        weight: [out, in]; with `gated` [2 * out, in], gate then up.
        bias: [out]; with `gated` [2 * out].
        norm_weight: [in], of an RMSNorm of x.
        eps: of that norm.
        gated: return silu(gate) * up.
        add_to: [rows, out], the result is added to it in place.
        out: [rows, out], the memory of the result if it is to be a given one.

    Returns:
        [rows, out], in the dtype of x; `add_to` or `out` if given.
    """
    rows, k = x.shape
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    y = add_to if add_to is not None else out
    if y is None:
        y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    blocks, ahead, per_warp = tiling(k, norm_weight is not None, gated, x.element_size())
    kernel = _gemv_kernel[(cdiv(n, _WARPS * per_warp),)](
        x, weight, bias, norm_weight, y, eps, n, k,
        GATED=gated, ADD=add_to is not None,
        HAS_BIAS=bias is not None, HAS_NORM=norm_weight is not None,
        WARPS=_WARPS, ROWS=rows, PER_WARP=per_warp, BLOCKS=blocks, AHEAD=ahead,
        num_warps=_WARPS, **pdl(x),
    )  # fmt: skip
    prefer_shared_memory(kernel)
    return y


def tiling(
    k: int, has_norm: bool, gated: bool, element_size: int
) -> tuple[tuple[int, ...], int, int]:
    """Sizes of a row's blocks, how many are loaded ahead, and the rows of the weight per warp.

    Enough loads are in flight for each thread, and no register is spilled (measured in the shapes
    of Qwen3-0.6B to 32B, in bf16; K = 25600, 5120 outputs, one row on an H200: 72 us, with three
    ahead, which spill, 86, by `split_k` 81).
    """
    if element_size > 2:
        size, ahead, per_warp = 512, 1, 1
    elif not has_norm and k > 2048:
        size, ahead, per_warp = 1024, 3 if k <= 17408 else 2, 2
    elif k >= 256 and k & (k - 1) == 0 and k * (1 + gated) <= 4096:
        size, ahead, per_warp = k, 1, 4096 // (k * (1 + gated))
    elif gated:
        size, ahead, per_warp = (2048, 2, 1) if k <= 2560 else (512, 2, 2)
    else:
        size, ahead, per_warp = 512, 3, 2
    lengths = [min(size, k - start) for start in range(0, k, size)]
    return tuple(max(256, next_power_of_2(n)) for n in lengths), ahead, per_warp


@triton.jit
def _gemv_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, y_ptr, eps, n, k: tl.constexpr,
    GATED: tl.constexpr, ADD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    WARPS: tl.constexpr, ROWS: tl.constexpr, PER_WARP: tl.constexpr, BLOCKS: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    # Tiles are [warp, row of x, output of the warp, K / 256, 256]; the last is one 16-byte load of
    # each of a warp's 32 lanes. With the warps in front, the compiler gives each one whole rows.
    warp = tl.arange(0, WARPS)[:, None, None, None, None]
    row = tl.arange(0, ROWS)[None, :, None, None, None]
    out = tl.arange(0, PER_WARP)[None, None, :, None, None]
    out += (tl.program_id(0) * WARPS + warp) * PER_WARP
    weights = weight_ptr + out.to(tl.int64) * k
    zero = warp * 0  # x and g are the same for every warp, but laid out like the weights

    acc = tl.zeros([WARPS, ROWS, PER_WARP, 256], tl.float32)
    acc_up = tl.zeros([WARPS, ROWS, PER_WARP, 256], tl.float32)
    squares = tl.zeros([WARPS, ROWS, 1, 256], tl.float32)
    w, w_up, g = (), (), ()
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
        if i >= 0:
            x = _load(x_ptr + row * k, i * BLOCKS[0] + zero, k, True, BLOCKS[i], "").to(tl.float32)
            if HAS_NORM:
                squares += tl.sum(x * x, axis=3)
                x *= g[i].to(tl.float32)
            acc += tl.sum(w[i].to(tl.float32) * x, axis=3)
            if GATED:
                acc_up += tl.sum(w_up[i].to(tl.float32) * x, axis=3)

    scale = tl.rsqrt(tl.sum(squares, axis=3) / k + eps) if HAS_NORM else 1.0
    y = tl.sum(acc, axis=3) * scale
    # [warp, row of x, output of the warp]
    row = tl.arange(0, ROWS)[None, :, None]
    out = tl.arange(0, WARPS)[:, None, None] * PER_WARP + tl.arange(0, PER_WARP)[None, None, :]
    out += tl.program_id(0) * WARPS * PER_WARP
    if HAS_BIAS:
        y += tl.load(bias_ptr + out, mask=out < n, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(acc_up, axis=3) * scale
        if HAS_BIAS:
            up += tl.load(bias_ptr + n + out, mask=out < n, other=0.0).to(tl.float32)
        y = silu_times(y, up)
    target = y_ptr + row * n + out
    if ADD:
        y += tl.load(target, mask=out < n, other=0.0).to(tl.float32)
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=out < n)


@triton.jit
def _load(rows_ptr, start, k: tl.constexpr, mask, SIZE: tl.constexpr, CACHE: tl.constexpr):
    lane = tl.arange(0, 256)[None, None, None, None, :]
    at = start + tl.arange(0, SIZE // 256)[None, None, None, :, None] * 256 + lane
    return tl.load(rows_ptr + at, mask=mask & (at < k), other=0.0, cache_modifier=CACHE)
