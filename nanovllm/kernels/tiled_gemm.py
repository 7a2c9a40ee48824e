"""Matrix times a few hundred vectors, of a model whose matrices are small.

At 129 to 256 rows a library's tiles, of 128 x 128 and more, do not fill the chip with the matrices
of a small model. Here tiles of 64 x 64, fed by the tensor memory accelerator, give two or three
programs to each multiprocessor (a decode step of 256 rows of Qwen3-0.6B takes 2.72 ms with them on
an H200, without 2.81). What goes back into the residual stream is cut over K besides, into partial
sums as in `split_k`; the gate of the MLP is applied on the way out.

Grid: (tile of rows, tile of outputs, slice of K). Bytes moved: the weights once from memory, and
from the L2 cache once more for each further tile of rows. Bound by latency.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels.activation import silu_times
from nanovllm.kernels.launch import cdiv, launch_dependents, pdl, wait

MIN_ROWS, MAX_ROWS = 129, 256
SPLITS = 4  # of what goes back into the residual stream
_ROWS, _OUTPUTS, _BLOCK_K = 64, 64, 64


def tiled_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    splits: int | None = None,
    gated: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """W x, whole or in parts.

    Args:
        x: [rows, in]; `in` is a multiple of 8.
        weight: [out, in]; with `gated` [2 * out, in], gate then up.
        splits: into how many slices the inner dimension is cut; None leaves it whole.
        gated: return silu(gate) * up, without `splits`.
        out: the memory of the result if it is to be a given one.

    Returns:
        [splits, rows, out] float32, whose sum is the product; without `splits` the product itself,
        [rows, out], in the dtype of x.
    """
    (rows, k), n = x.shape, weight.shape[0]
    n, outputs = (n // 2, _OUTPUTS // 2) if gated else (n, _OUTPUTS)
    shape, dtype = ((rows, n), x.dtype) if splits is None else ((splits, rows, n), torch.float32)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=x.device)
    splits = splits or 1
    slice_k = cdiv(k, splits * _BLOCK_K) * _BLOCK_K
    _tiled_gemm_kernel[(cdiv(rows, _ROWS), cdiv(n, outputs), splits)](
        TensorDescriptor.from_tensor(x, [_ROWS, _BLOCK_K]),
        TensorDescriptor.from_tensor(weight, [outputs, _BLOCK_K]),
        out, rows, n, k, slice_k,
        ROWS=_ROWS, OUTPUTS=outputs, BLOCK_K=_BLOCK_K, GATED=gated, LATE=gated or splits > 1,
        num_warps=4, num_stages=4 if gated else 6, **pdl(x),
    )  # fmt: skip
    return out


@triton.jit
def _tiled_gemm_kernel(
    x_desc, weight_desc, out_ptr, rows, n: tl.constexpr, k: tl.constexpr, slice_k: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_K: tl.constexpr, GATED: tl.constexpr,
    LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if not LATE:
        launch_dependents(PDL)
    first_row, first_out = tl.program_id(0) * ROWS, tl.program_id(1) * OUTPUTS
    first = tl.program_id(2) * slice_k
    acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    acc_up = tl.zeros([ROWS, OUTPUTS], tl.float32)
    wait(PDL)
    for start in range(first, tl.minimum(first + slice_k, k), BLOCK_K):
        x = x_desc.load([first_row, start])  # past the end of a tensor there are zeros
        acc = tl.dot(x, tl.trans(weight_desc.load([first_out, start])), acc)
        if GATED:
            acc_up = tl.dot(x, tl.trans(weight_desc.load([n + first_out, start])), acc_up)
    if LATE:  # the programs of the next kernel would take room, and so be spread unevenly
        launch_dependents(PDL)
    if GATED:
        acc = silu_times(acc, acc_up)
    row, outs = first_row + tl.arange(0, ROWS), first_out + tl.arange(0, OUTPUTS)
    cells = (tl.program_id(2) * rows + row)[:, None] * n + outs[None, :]
    mask = (row < rows)[:, None] & (outs < n)[None, :]
    tl.store(out_ptr + cells, acc.to(out_ptr.dtype.element_ty), mask=mask)
