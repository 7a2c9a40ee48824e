"""Matrix times a few dozen vectors: partial products over slices of K.

With up to 64 rows, and mostly up to 128 (`kernels.linear` has the rule), a product is still the
reading of its weights, and a library's kernels are made for more. Here each program streams 64 rows
of the weight by a slice of K through a deep pipeline, and has the first of them fetched into the
second-level cache while the kernel before it still runs. The gate of the MLP is applied on the way
out. What goes back into the residual stream is cut into as many slices as give every multiprocessor
a program. The partial sums stay float32 and are added up, in a fixed order, by the kernel that
comes next (the residual add of `rms_norm`): results are deterministic, and no kernel is launched
for the sum. A bias is added by the first slice.

Grid: (tile of outputs, slice of K). Bytes moved: the weights once. Bound by memory.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.activation import silu_times
from nanovllm.kernels.launch import launch_dependents, pdl, prefetch, wait

MAX_ROWS = 128
_TILE, _BLOCK_K, _PROGRAMS = 64, 128, 128


def num_splits(out_features: int) -> int:
    """Slices of K that give each multiprocessor a program."""
    return max(1, min(8, _PROGRAMS // -(-out_features // _TILE)))


def split_k(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    splits: int | None = None,
    gated: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """W x + b, whole or in parts.

    Args:
        x: [rows, in], at most `MAX_ROWS` rows.
        weight: [out, in]; with `gated` [2 * out, in], gate then up.
        bias: [out]; with `gated` [2 * out].
        splits: into how many slices the inner dimension is cut; None leaves it whole.
        gated: return silu(gate) * up, without `splits`.
        out: the memory of the result if it is to be a given one.

    Returns:
        [splits, rows, out] float32, whose sum is the product; without `splits` the product itself,
        [rows, out], in the dtype of x.
    """
    (rows, k), n = x.shape, weight.shape[0]
    n, outputs = (n // 2, _TILE // 2) if gated else (n, _TILE)
    shape, dtype = ((rows, n), x.dtype) if splits is None else ((splits, rows, n), torch.float32)
    splits = splits or 1
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=x.device)
    padded_rows, block_k, stages = tiling(rows)
    _split_k_kernel[(triton.cdiv(n, outputs), splits)](
        x, weight, bias, out, rows, n, k, _slice_size(k, splits),
        ROWS=padded_rows, TILE=_TILE, BLOCK_K=block_k, GATED=gated, HAS_BIAS=bias is not None,
        num_warps=4, num_stages=stages, **pdl(x),
    )  # fmt: skip
    return out


def tiling(rows: int) -> tuple[int, int, int]:
    """Padded rows, a block of K, and the stages of the pipeline.

    There are so many stages that the shared memory of a multiprocessor has no room for a second
    program: where two would share one, others had none.
    """
    padded_rows = max(16, triton.next_power_of_2(rows))
    return padded_rows, _BLOCK_K if padded_rows <= 64 else 64, 6 if padded_rows == 16 else 5


def _slice_size(k: int, splits: int) -> int:
    """A multiple of a block; the last slices may be short, or empty."""
    return -(-k // (splits * _BLOCK_K)) * _BLOCK_K


@triton.jit
def _split_k_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, n: tl.constexpr, k: tl.constexpr,
    slice_k: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    lane = tl.arange(0, TILE)
    outputs: tl.constexpr = TILE // 2 if GATED else TILE
    first_out = tl.program_id(0) * outputs
    if GATED:  # 8 rows of gate, 8 of up, and so on: one thread gets both of a pair
        outs = first_out + lane // 16 * 8 + lane % 8
        weight_rows = outs + lane // 8 % 2 * n
    else:
        outs = first_out + lane
        weight_rows = outs
    row = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * slice_k
    weight_starts = weight_ptr + weight_rows.to(tl.int64)[:, None] * k
    weights = weight_starts + cols[None, :]
    xs = x_ptr + row[:, None] * k + cols[None, :]
    even: tl.constexpr = n % outputs == 0 and k % BLOCK_K == 0
    if even:  # two blocks; all of them would be slower (see docs/performance.md)
        blocks = tl.minimum(first + tl.arange(0, 2) * BLOCK_K, k - BLOCK_K)
        prefetch(weight_starts + blocks[None, :], 2 * BLOCK_K, PDL)
    acc = tl.zeros([TILE, ROWS], tl.float32)
    wait(PDL)
    for start in range(first, tl.minimum(first + slice_k, k), BLOCK_K):
        if even:
            w = tl.load(weights + start)
            x = tl.load(xs + start, mask=(row < rows)[:, None], other=0.0)
        else:
            inside = (start + cols < k)[None, :]
            w = tl.load(weights + start, mask=(outs < n)[:, None] & inside, other=0.0)
            x = tl.load(xs + start, mask=(row < rows)[:, None] & inside, other=0.0)
        acc = tl.dot(w, tl.trans(x), acc)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + weight_rows, mask=outs < n, other=0.0).to(tl.float32)
        acc += tl.where(tl.program_id(1) == 0, bias, 0.0)[:, None]
    if GATED:
        pairs = tl.reshape(acc, [TILE // 16, 2, 8, ROWS])
        gate, up = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
        acc = tl.reshape(silu_times(gate, up), [outputs, ROWS])
        outs = first_out + tl.arange(0, outputs)
    cells = (tl.program_id(1) * rows + row)[None, :] * n + outs[:, None]
    mask = (row < rows)[None, :] & (outs < n)[:, None]
    tl.store(out_ptr + cells, acc.to(out_ptr.dtype.element_ty), mask=mask)
