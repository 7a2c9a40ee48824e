"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), after adding up what x still lacks.

    x += sum of partials                (in place, rounded to the dtype of x, if there are any)
    y  = x / sqrt(mean(x^2) + eps) * weight

Grid: one program a row. Bytes moved a row of n elements: x read and y written; with `partials` they
are read and x is written too. Bound by memory, and by launch latency at small batches.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.launch import launch_dependents, pdl, wait


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    partials: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm over the last dimension of `x` [rows, n], its mean in float32. Returns one like x, or
    `out` if that is given.

    `partials` [splits, rows, n] are first added to `x`, in place.
    """
    rows, n = x.shape
    y = torch.empty_like(x) if out is None else out
    block = triton.next_power_of_2(n)
    _rms_norm_kernel[(rows,)](
        x, partials, weight, y, n, eps, rows * n if partials is None else partials.stride(0),
        SPLITS=0 if partials is None else partials.shape[0], BLOCK=block,
        num_warps=min(8, max(1, block // 512)), **pdl(x),
    )  # fmt: skip
    return y


@triton.jit
def _rms_norm_kernel(
    x_ptr, partials_ptr, weight_ptr, y_ptr, n, eps, split_stride,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < n
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    wait(PDL)
    cells = row * n + cols
    x = tl.load(x_ptr + cells, mask=mask, other=0.0)
    if SPLITS:
        total = x.to(tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(partials_ptr + split * split_stride + cells, mask=mask, other=0.0)
        x = total.to(x.dtype)
        tl.store(x_ptr + cells, x, mask=mask)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / n + eps)
    tl.store(y_ptr + cells, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=mask)
