"""Matrix times a few vectors, with the small operations around it in the same kernel.

    y = W norm(x)                      norm: RMSNorm, optional
    y = silu(W_gate norm(x)) * (W_up norm(x))
    y += W x                           in place, the residual add

For the one to four rows of a small decode batch a matrix product is the reading of its weights, and
the gaps between many small kernels cost as much again. Here the norm is `(W (x * g)) * rsqrt(mean
x^2 + eps)`, which needs x once; each warp owns whole rows of the weight, so that every thread has
many 16-byte loads under way, and there is one reduction, nothing split over programs, no atomics:
results are deterministic. The weights are loaded before the wait for the kernel that makes x.

Grid: (slice of the output). Bytes moved: the weights once. Bound by memory.
"""

import torch
import torch.nn.functional as F

from nanovllm.kernels._triton import HAS_TRITON, launch_next, pdl, tl, triton, wait_for_previous
from nanovllm.kernels.rms_norm import rms_norm_torch
from nanovllm.kernels.silu_and_mul import silu_and_mul_torch

MAX_ROWS = 4
_MANY_OUTPUTS = 32768  # past them a library's product is faster from 3 rows on (measured)
_WARPS = 4


def can_gemv(x: torch.Tensor, out_features: int) -> bool:
    """Whether `x` [rows, in] has few enough rows, and is where the kernel runs."""
    max_rows = MAX_ROWS if out_features <= _MANY_OUTPUTS else 2
    return x.is_cuda and HAS_TRITON and x.shape[0] <= max_rows


def gemv_torch(x, weight, bias=None, norm_weight=None, eps=0.0, gated=False, add_to=None):
    if norm_weight is not None:
        x = rms_norm_torch(x, norm_weight, eps)
    y = F.linear(x, weight, bias)
    if gated:
        return silu_and_mul_torch(y)
    return y if add_to is None else add_to.add_(y)


def gemv_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """W x, with what comes before and after it.

    Args:
        x: [rows, in], at most `MAX_ROWS` rows.
        weight: [out, in]; with `gated` [2 * out, in], gate then up, and no bias.
        bias: [out].
        norm_weight: [in], of an RMSNorm of x.
        eps: of that norm.
        gated: return silu(gate) * up.
        add_to: [rows, out], the result is added into it in place.

    Returns:
        [rows, out], in the dtype of x; `add_to` if given.
    """
    rows, k = x.shape
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device) if add_to is None else add_to
    # Enough 16-byte loads in flight for each thread, and no register spilled (measured).
    whole_k = max(256, triton.next_power_of_2(k))
    block_k = min(whole_k, 2048 if rows > 1 or gated else 4096)
    per_warp = max(1, (2048 if gated else 4096) // whole_k)
    _gemv_kernel[(triton.cdiv(n, _WARPS * per_warp),)](
        x, weight, bias, norm_weight, y, eps, n, k, rows,
        GATED=gated, ADD=add_to is not None,
        HAS_BIAS=bias is not None, HAS_NORM=norm_weight is not None,
        WARPS=_WARPS, ROWS=triton.next_power_of_2(rows), PER_WARP=per_warp, BLOCK_K=block_k,
        num_warps=_WARPS, **pdl(x),
    )  # fmt: skip
    return y


@triton.jit
def _gemv_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, y_ptr, eps, n, k: tl.constexpr, rows,
    GATED: tl.constexpr, ADD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    WARPS: tl.constexpr, ROWS: tl.constexpr, PER_WARP: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    launch_next(PDL)
    # Tiles are [warp, row of x, output of the warp, K / 256, 256]; the last is one 16-byte load of
    # each of a warp's 32 lanes. With the warps in front, the compiler gives each one whole rows.
    warp = tl.arange(0, WARPS)[:, None, None, None, None]
    row = tl.arange(0, ROWS)[None, :, None, None, None]
    out = tl.arange(0, PER_WARP)[None, None, :, None, None]
    lane = tl.arange(0, 256)[None, None, None, None, :]
    col = tl.arange(0, BLOCK_K // 256)[None, None, None, :, None] * 256 + lane
    out += (tl.program_id(0) * WARPS + warp) * PER_WARP
    real = out < n
    weights = weight_ptr + out.to(tl.int64) * k
    col += warp * 0  # x and g: the same for every warp, but laid out like the weights

    acc = tl.zeros([WARPS, ROWS, PER_WARP, 256], tl.float32)
    acc_up = tl.zeros([WARPS, ROWS, PER_WARP, 256], tl.float32)
    squares = tl.zeros([WARPS, ROWS, 1, 256], tl.float32)
    for start in range(0, k, BLOCK_K):
        at = start + col
        w = tl.load(weights + at, mask=real & (at < k), other=0.0)
        if GATED:
            w_up = tl.load(weights + n.to(tl.int64) * k + at, mask=real & (at < k), other=0.0)
        if HAS_NORM:
            g = tl.load(norm_ptr + at, mask=at < k, other=0.0).to(tl.float32)
        wait_for_previous(PDL)
        x = tl.load(x_ptr + row * k + at, mask=(row < rows) & (at < k), other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += tl.sum(x * x, axis=3)
            x *= g
        acc += tl.sum(w.to(tl.float32) * x, axis=3)
        if GATED:
            acc_up += tl.sum(w_up.to(tl.float32) * x, axis=3)

    scale = tl.rsqrt(tl.sum(squares, axis=3) / k + eps) if HAS_NORM else 1.0
    y = tl.sum(acc, axis=3) * scale
    # [warp, row of x, output of the warp]
    row = tl.arange(0, ROWS)[None, :, None]
    out = tl.arange(0, WARPS)[:, None, None] * PER_WARP + tl.arange(0, PER_WARP)[None, None, :]
    out += tl.program_id(0) * WARPS * PER_WARP
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * (tl.sum(acc_up, axis=3) * scale)
    if HAS_BIAS:
        y += tl.load(bias_ptr + out, mask=out < n, other=0.0).to(tl.float32)
    target = y_ptr + row * n + out
    mask = (row < rows) & (out < n)
    if ADD:
        y += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=mask)
