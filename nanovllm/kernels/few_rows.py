"""Matrix times 2 to 8 vectors, with the small operations around it in the same kernel: what
`kernels.gemv` does for one vector, by matrix instructions.

    y = W norm(x) + b                  norm (RMSNorm) and b are optional
    y = silu(W_gate norm(x) + b_gate) * (W_up norm(x) + b_up)
    y += W x + b                       in place, the residual add

With so few rows a product is the reading of its weights, and a kernel more for the norm, or a sum
over programs, costs as much again. So a program has whole rows of the weight, all of them loaded
before the wait for the kernel that makes x; its warps share the inputs out among them, and add up
at the end. The norm is `(W (x * g)) * rsqrt(mean x^2 + eps)`, with x * g rounded to the dtype of x,
as a product of two matrices takes it.

Grid: (16 outputs). Bytes moved: the weights once. Bound by memory, and by the latency of a kernel.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.activation import silu_times
from nanovllm.kernels.launch import cdiv, launch_dependents, pdl, prefer_shared_memory, wait

MAX_ROWS = 8
# A program keeps 16 rows of the weight in shared memory, 32 bytes for each of the inputs.
MAX_IN_FEATURES = 3072
_OUTPUTS = 16
_WARPS = 4
_INPUTS = 256  # of a warp, in each piece


def few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """W x + b, with what comes before and after it. Arguments and result are those of
    `kernels.gemv.gemv`, but for the number of rows: up to `MAX_ROWS`.
    """
    rows, k = x.shape
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    y = add_to if add_to is not None else out
    if y is None:
        y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    kernel = _few_rows_kernel[(cdiv(n, _OUTPUTS),)](
        x, weight, bias, norm_weight, y, eps, n, rows, k, GATED=gated, ADD=add_to is not None,
        HAS_BIAS=bias is not None, HAS_NORM=norm_weight is not None, PADDED_ROWS=MAX_ROWS,
        OUTPUTS=_OUTPUTS, WARPS=_WARPS, INPUTS=_INPUTS, PIECES=cdiv(k, _WARPS * _INPUTS),
        num_warps=_WARPS, **pdl(x),
    )  # fmt: skip
    prefer_shared_memory(kernel)
    return y


@triton.jit
def _few_rows_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, y_ptr, eps, n, rows: tl.constexpr, k: tl.constexpr,
    GATED: tl.constexpr, ADD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    PADDED_ROWS: tl.constexpr, OUTPUTS: tl.constexpr, WARPS: tl.constexpr, INPUTS: tl.constexpr,
    PIECES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    # Tiles are [warp, output or row, input of the warp's slice]: a product for each warp.
    out = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS))[None, :, None]
    row = tl.arange(0, PADDED_ROWS)[None, :, None]
    lane = tl.arange(0, WARPS)[:, None, None] * INPUTS + tl.arange(0, INPUTS)[None, None, :]
    weights = weight_ptr + out.to(tl.int64) * k
    ups = weights + n.to(tl.int64) * k
    w, w_up, g = (), (), ()
    for piece in tl.static_range(PIECES):
        at = piece * WARPS * INPUTS + lane
        mask = (out < n) & (at < k)
        w += (_load(weights + at, mask, ".cg"),)
        if GATED:
            w_up += (_load(ups + at, mask, ".cg"),)
        if HAS_NORM:
            g += (_load(norm_ptr + at, at < k, ""),)
    wait(PDL)

    acc = tl.zeros([WARPS, OUTPUTS, PADDED_ROWS], tl.float32)
    acc_up = tl.zeros([WARPS, OUTPUTS, PADDED_ROWS], tl.float32)
    squares = tl.zeros([WARPS, PADDED_ROWS], tl.float32)
    for piece in tl.static_range(PIECES):
        at = piece * WARPS * INPUTS + lane
        x = _load(x_ptr + row * k + at, (row < rows) & (at < k), "")
        if HAS_NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=2)
            x = (wide * g[piece].to(tl.float32)).to(x.dtype)
        x = tl.permute(x, (0, 2, 1))
        acc = tl.dot(w[piece], x, acc, input_precision="ieee")
        if GATED:
            acc_up = tl.dot(w_up[piece], x, acc_up, input_precision="ieee")

    y = tl.sum(acc, axis=0)
    up = tl.sum(acc_up, axis=0)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / k + eps)[None, :]
        y *= scale
        up *= scale
    # [output, row]
    out = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS))[:, None]
    row = tl.arange(0, PADDED_ROWS)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + out, mask=out < n, other=0.0).to(tl.float32)
    if GATED:
        if HAS_BIAS:
            up += tl.load(bias_ptr + n + out, mask=out < n, other=0.0).to(tl.float32)
        y = silu_times(y, up)
    target = y_ptr + row * n + out
    mask = (out < n) & (row < rows)
    if ADD:
        y += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load(addresses, mask, CACHE: tl.constexpr):
    return tl.load(addresses, mask=mask, other=0.0, cache_modifier=CACHE)
