"""Weights in fp8 times any number of rows in fp8, where no other kernel serves the product.

That is for weights with scales of groups, on GPUs for which `kernels.split_k` is not made, and in
dtypes or sizes that the library's product lacks. The tensor cores multiply 128 of K at a time; the
sums go to float32 accumulators, with the scales of their groups if there are any. For a result in
float32 the factors are widened to float16 before, so that the sums are exact. Neighbouring programs
share rows of the weight, which stay in the second-level cache.

Grid: (tile of rows and tile of outputs). Bytes moved: both once from memory, and from the L2 cache
once more for each further tile of the other. Bound by the tensor cores with many rows, else by
memory.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.fp8_rows import as_factor
from nanovllm.kernels.launch import cdiv, gpu_with, launch_dependents, next_power_of_2, pdl, wait
from nanovllm.quantization.fp8 import GROUP

_OUTPUTS, _MOST_ROWS = 128, 128  # of a tile
_BAND = 8  # tiles of rows that run before the next tile of outputs


def fp8_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """W x + b: [rows, out] of `dtype`.

    Args:
        x, weight: [rows, in] and [out, in] e4m3.
        scales: of both, as those of `split_k`.
        bias: [out].
        out: the memory of the result if it is to be a given one.
    """
    (rows, k), n = x.shape, weight.shape[0]
    if out is None:
        out = torch.empty(rows, n, dtype=dtype, device=x.device)
    gpu, is_exact = gpu_with(x), dtype == torch.float32
    most_rows, stages = _MOST_ROWS, 4 if gpu is not None and gpu.is_hopper_class else 3
    if is_exact:  # what is widened takes registers and shared memory
        most_rows, stages = _MOST_ROWS // 2, 2
    padded_rows = min(most_rows, max(16, next_power_of_2(rows)))
    grid = (cdiv(rows, padded_rows) * cdiv(n, _OUTPUTS),)
    _fp8_gemm_kernel[grid](
        x, weight, bias, out, *scales, rows, n, k,
        ROWS=padded_rows, OUTPUTS=_OUTPUTS, BLOCK_K=GROUP, BAND=_BAND,
        HAS_GROUPS=scales[0].shape[1] > 1, HAS_BIAS=bias is not None, EXACT=is_exact,
        num_warps=8 if padded_rows == _MOST_ROWS else 4, num_stages=stages, **pdl(x),
    )  # fmt: skip
    return out


@triton.jit
def _fp8_gemm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, x_scale_ptr, weight_scale_ptr, rows, n: tl.constexpr,
    k: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_K: tl.constexpr,
    BAND: tl.constexpr, HAS_GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    tiles_of_rows = tl.cdiv(rows, ROWS)
    tiles_of_band = BAND * tl.cdiv(n, OUTPUTS)
    first_tile = tl.program_id(0) // tiles_of_band * BAND
    width = tl.minimum(tiles_of_rows - first_tile, BAND)
    place = tl.program_id(0) % tiles_of_band
    row = (first_tile + place % width) * ROWS + tl.arange(0, ROWS)
    outs = place // width * OUTPUTS + tl.arange(0, OUTPUTS)
    cols = tl.arange(0, BLOCK_K)
    xs = x_ptr + row.to(tl.int64)[:, None] * k + cols[None, :]
    weights = weight_ptr + outs.to(tl.int64)[:, None] * k + cols[None, :]
    row_mask, out_mask = row < rows, outs < n
    acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    wait(PDL)
    for start in range(0, k, BLOCK_K):
        inside = (start + cols < k)[None, :]
        x = as_factor(tl.load(xs + start, mask=row_mask[:, None] & inside, other=0.0), EXACT)
        w = as_factor(tl.load(weights + start, mask=out_mask[:, None] & inside, other=0.0), EXACT)
        if HAS_GROUPS:
            group = start // BLOCK_K
            x_scale = tl.load(x_scale_ptr + group * rows + row, mask=row_mask, other=0)
            scale = tl.load(weight_scale_ptr + group * n + outs, mask=out_mask, other=0)
            acc += tl.dot(x, tl.trans(w)) * x_scale[:, None] * scale[None, :]
        else:
            acc = tl.dot(x, tl.trans(w), acc, max_num_imprecise_acc=BLOCK_K)
    if not HAS_GROUPS:
        acc *= tl.load(x_scale_ptr + row, mask=row_mask, other=0)[:, None]
        acc *= tl.load(weight_scale_ptr + outs, mask=out_mask, other=0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outs, mask=out_mask, other=0.0).to(tl.float32)[None, :]
    cells = row.to(tl.int64)[:, None] * n + outs[None, :]
    mask = row_mask[:, None] & out_mask[None, :]
    tl.store(out_ptr + cells, acc.to(out_ptr.dtype.element_ty), mask=mask)
