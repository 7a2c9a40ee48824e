"""Matrix times a few dozen vectors: partial products over slices of K.

With up to 64 rows, and mostly up to 128 (`kernels.choice` has the rule), a product is still the
reading of its weights, and a library's kernels are made for more. Here each program streams 64 rows
of the weight by a slice of K through a deep pipeline, and has the first of them fetched into the
second-level cache while the kernel before it still runs. The gate of the MLP is applied on the way
out. What goes back into the residual stream is cut into as many slices as give every multiprocessor
a program. The partial sums stay float32 and are added up, in a fixed order, by the kernel that
comes next (the residual add of `rms_norm`): results are deterministic, and no kernel is launched
for the sum. A bias is added by the first slice.

In fp8 (see `quantization.fp8`) the tensor cores multiply both as they are; they add up 128 products
in their own precision, and the rest is float32. Scales are applied to such sums, or once at the
end. For a product in float32 both are widened to float16 before, so that the sums are exact.

Grid: (tile of outputs, slice of K). Bytes moved: the weights once. Bound by memory.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.activation import silu_times
from nanovllm.kernels.fp8_rows import as_factor
from nanovllm.kernels.launch import cdiv, launch_dependents, next_power_of_2, pdl, prefetch, wait

MAX_ROWS = 128
_TILE, _BLOCK_K, _PROGRAMS = 64, 128, 128
MANY_PROGRAMS = 264  # two for each multiprocessor of an H100 or H200


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
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """W x + b, whole or in parts.

    Args:
        x: [rows, in], at most `MAX_ROWS` rows.
        weight: [out, in]; with `gated` [2 * out, in], gate then up.
        bias: [out]; with `gated` [2 * out].
        splits: into how many slices the inner dimension is cut; None leaves it whole.
        gated: return silu(gate) * up, without `splits`.
        out: the memory of the result if it is to be a given one.
        scales: of x and of the weight, if both are in fp8: [rows, in / g] and [out, in / g]
            float32, g being `GROUP`, or `in`. Those of one group are side by side.
        dtype: of the product, if it is not that of x.

    Returns:
        [splits, rows, out] float32, whose sum is the product; without `splits` the product itself,
        [rows, out].
    """
    (rows, k), n = x.shape, weight.shape[0]
    n, outputs = (n // 2, _TILE // 2) if gated else (n, _TILE)
    dtype = dtype or x.dtype
    is_exact = scales is not None and dtype == torch.float32
    shape, dtype = ((rows, n), dtype) if splits is None else ((splits, rows, n), torch.float32)
    splits = splits or 1
    x_scale, weight_scale = scales or (None, None)
    has_groups = x_scale is not None and x_scale.shape[1] > 1
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=x.device)
    slice_k = _slice_size(k, splits)
    padded_rows, block_k, stages = tiling(rows)
    programs = cdiv(n, outputs) * splits
    if scales is not None:
        block_k, stages = fp8_tiling(rows, slice_k, programs, has_groups)
    _split_k_kernel[(cdiv(n, outputs), splits)](
        x, weight, bias, out, x_scale, weight_scale, rows, n, k, slice_k,
        ROWS=padded_rows, TILE=_TILE, BLOCK_K=block_k, GATED=gated, HAS_BIAS=bias is not None,
        IN_FP8=scales is not None, HAS_GROUPS=has_groups, EXACT=is_exact,
        num_warps=4, num_stages=stages, **pdl(x),
    )  # fmt: skip
    return out


def tiling(rows: int) -> tuple[int, int, int]:
    """Padded rows, a block of K, and the stages of the pipeline.

    There are so many stages that the shared memory of a multiprocessor has no room for a second
    program: where two would share one, others had none.
    """
    padded_rows = max(16, next_power_of_2(rows))
    return padded_rows, _BLOCK_K if padded_rows <= 64 else 64, 6 if padded_rows == 16 else 5


def fp8_tiling(rows: int, slice_k: int, programs: int, has_groups: bool) -> tuple[int, int]:
    """The block of K and the stages of the pipeline in fp8.

    They take as many bytes as in 16 bits: twice the block, or twice the stages where such a block
    would cut a slice or span two groups. If there are many programs each takes half of that, so
    that two share a multiprocessor. With groups, a block is always one group.
    """
    _, block_k, stages = tiling(rows)
    if programs >= MANY_PROGRAMS and block_k == _BLOCK_K:
        return block_k, stages
    if 2 * block_k <= _BLOCK_K or (not has_groups and slice_k % (2 * block_k) == 0):
        return 2 * block_k, stages
    return block_k, 2 * stages


def _slice_size(k: int, splits: int) -> int:
    """A multiple of a block; the last slices may be short, or empty."""
    return -(-k // (splits * _BLOCK_K)) * _BLOCK_K


@triton.jit
def _split_k_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, x_scale_ptr, weight_scale_ptr, rows, n: tl.constexpr,
    k: tl.constexpr, slice_k: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, IN_FP8: tl.constexpr,
    HAS_GROUPS: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
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
        prefetch(weight_starts + blocks[None, :], BLOCK_K if IN_FP8 else 2 * BLOCK_K, PDL)
    acc = tl.zeros([TILE, ROWS], tl.float32)
    if IN_FP8:
        weight_scales, x_scales = weight_scale_ptr + weight_rows, x_scale_ptr + row
    wait(PDL)
    for start in range(first, tl.minimum(first + slice_k, k), BLOCK_K):
        if even:
            w = tl.load(weights + start)
            x = tl.load(xs + start, mask=(row < rows)[:, None], other=0.0)
        else:
            inside = (start + cols < k)[None, :]
            w = tl.load(weights + start, mask=(outs < n)[:, None] & inside, other=0.0)
            x = tl.load(xs + start, mask=(row < rows)[:, None] & inside, other=0.0)
        w, x = as_factor(w, EXACT), as_factor(x, EXACT)
        if HAS_GROUPS:
            group = start // BLOCK_K
            scale = tl.load(weight_scales + group * n * (2 if GATED else 1), mask=outs < n, other=0)
            x_scale = tl.load(x_scales + group * rows, mask=row < rows, other=0)
            acc += tl.dot(w, tl.trans(x)) * scale[:, None] * x_scale[None, :]
        elif IN_FP8:
            acc = tl.dot(w, tl.trans(x), acc, max_num_imprecise_acc=128)
        else:
            acc = tl.dot(w, tl.trans(x), acc)
    if IN_FP8 and not HAS_GROUPS:
        scale = tl.load(weight_scales, mask=outs < n, other=0)
        acc = acc * scale[:, None] * tl.load(x_scales, mask=row < rows, other=0)[None, :]
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
