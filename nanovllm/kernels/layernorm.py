"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), after adding up what x still lacks.

    x += sum of partials                (in place, rounded to the dtype of x, if there are any)
    y  = x / sqrt(mean(x^2) + eps) * weight

Grid: one program a row. Bytes moved a row of n elements: x read and y written; with `partials` they
are read and x is written too; y may be written in fp8 (see `kernels.fp8_rows`). Bound by memory,
and by launch latency at small batches.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.fp8_rows import empty_rows, store_in_fp8
from nanovllm.kernels.launch import launch_dependents, next_power_of_2, pdl, wait
from nanovllm.quantization.fp8 import GROUP

_FEW_ROWS = 256


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
    y = torch.empty_like(x) if out is None else out
    _launch(x, weight, eps, partials, y, None)
    return y


def rms_norm_in_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    partials: torch.Tensor | None = None,
    group: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quantize_rows` makes of the result of `rms_norm`, which is rounded to the dtype of x
    before."""
    values, scale = empty_rows(x, group)
    _launch(x, weight, eps, partials, values, scale)
    return values, scale


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    partials: torch.Tensor | None,
    y: torch.Tensor,
    scale: torch.Tensor | None,
) -> None:
    rows, n = x.shape
    # With few rows and partials a program has a multiprocessor to itself, and much to read.
    most_warps, per_warp = (16, 64) if partials is not None and rows <= _FEW_ROWS else (8, 512)
    block = next_power_of_2(n if scale is None else max(n, GROUP))
    _rms_norm_kernel[(rows,)](
        x, partials, weight, y, scale, n, eps,
        rows * n if partials is None else partials.stride(0), rows,
        SPLITS=0 if partials is None else partials.shape[0], BLOCK=block,
        IN_FP8=scale is not None, HAS_GROUPS=scale is not None and scale.shape[1] > 1, GROUP=GROUP,
        num_warps=min(most_warps, max(1, block // per_warp)), **pdl(x),
    )  # fmt: skip


@triton.jit
def _rms_norm_kernel(
    x_ptr, partials_ptr, weight_ptr, y_ptr, scale_ptr, n, eps, split_stride, rows,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, IN_FP8: tl.constexpr, HAS_GROUPS: tl.constexpr,
    GROUP: tl.constexpr, PDL: tl.constexpr,
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
    if IN_FP8:
        y = (x * scale * weight).to(x_ptr.dtype.element_ty).to(tl.float32)
        store_in_fp8(y, y_ptr, scale_ptr, row, rows, n, HAS_GROUPS, GROUP, BLOCK)
    else:
        tl.store(y_ptr + cells, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=mask)
