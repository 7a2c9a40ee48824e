"""Residual add and RMSNorm in one pass (Zhang & Sennrich 2019, arXiv:1910.07467).

    residual' = x + residual            (in place, rounded to the model's dtype)
    y         = residual' / sqrt(mean(residual'^2) + eps) * weight

Grid: one program a row. Bytes moved a row of n elements: reads x and residual, writes residual' and
y, 4 n elements (2 n without a residual). Bound by memory, and by launch latency at small batches.
"""

import torch
import torch.nn.functional as F

from nanovllm.kernels._triton import HAS_TRITON, tl, triton


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """RMSNorm over the last dimension of `x` [rows, n], after adding it into `residual` if given.

    `residual` [rows, n] is updated in place. Returns a tensor like `x`. The mean is float32.
    """
    if x.is_cuda and HAS_TRITON:
        return rms_norm_triton(x, weight, eps, residual)
    return rms_norm_torch(x, weight, eps, residual)


def rms_norm_torch(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    if residual is not None:
        x = residual.add_(x)
    return F.rms_norm(x, weight.shape, weight, eps)


def rms_norm_triton(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    rows, n = x.shape
    y = torch.empty_like(x)
    block = triton.next_power_of_2(n)
    _rms_norm_kernel[(rows,)](
        x, residual, weight, y, n, eps,
        HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=min(8, max(1, block // 512)),
    )  # fmt: skip
    return y


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, n, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < n
    x = tl.load(x_ptr + row * n + cols, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        total = x.to(tl.float32) + tl.load(residual_ptr + row * n + cols, mask=mask, other=0.0).to(
            tl.float32
        )
        x = total.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * n + cols, x, mask=mask)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / n + eps)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * n + cols, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=mask)
