"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467): y = x / sqrt(mean(x^2) + eps) * weight.

Grid: one program a row. Bytes moved: x read and y written, 2 n elements a row of n. Bound by
memory, and by launch latency at small batches.
"""

import torch
import torch.nn.functional as F

from nanovllm.kernels._triton import HAS_TRITON, launch_next, pdl, tl, triton, wait_for_previous


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension of `x` [rows, n], its mean in float32. Returns one like x."""
    if x.is_cuda and HAS_TRITON:
        return rms_norm_triton(x, weight, eps)
    return rms_norm_torch(x, weight, eps)


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    rows, n = x.shape
    y = torch.empty_like(x)
    block = triton.next_power_of_2(n)
    _rms_norm_kernel[(rows,)](
        x, weight, y, n, eps, BLOCK=block, num_warps=min(8, max(1, block // 512)), **pdl(x)
    )
    return y


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, y_ptr, n, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    launch_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < n
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + row * n + cols, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / n + eps)
    tl.store(y_ptr + row * n + cols, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=mask)
