"""Matrix times a few dozen vectors: partial products over slices of K.

With 5 to 64 rows (128 where it comes in parts) a matrix product is still the reading of its
weights, and a library's kernels are made for more. Here each program streams a tile of 64 outputs
by a slice of K through a deep pipeline, and there are as many slices as give every multiprocessor
one. The partial sums stay float32 and are added up, in a fixed order, by the kernel that comes next
(the residual add of `rms_norm`): results are deterministic, and no kernel is launched for the sum.

Grid: (tile of outputs, slice of K). Bytes moved: the weights once. Bound by memory.
"""

import torch
import torch.nn.functional as F

from nanovllm.kernels._triton import has_pdl, launch_next, pdl, tl, triton, wait_for_previous

MAX_ROWS, MAX_OUTPUTS = 64, 32768
MAX_ROWS_IN_PARTS = 128
_TILE, _BLOCK_K, _PROGRAMS = 64, 128, 128


def can_split_k(x: torch.Tensor, out_features: int, in_parts: bool) -> bool:
    """Whether `x` [rows, in] has few enough rows, and is where the kernel runs."""
    # The tiles are made for the shared memory of Hopper, and were measured there alone.
    if not x.is_cuda or x.element_size() != 2 or not has_pdl(x.get_device()):
        return False
    max_rows = MAX_ROWS_IN_PARTS if in_parts else MAX_ROWS
    return x.shape[0] <= max_rows and out_features <= MAX_OUTPUTS


def num_splits(out_features: int) -> int:
    """Slices of K that give each multiprocessor a program."""
    return max(1, min(8, _PROGRAMS // -(-out_features // _TILE)))


def split_k_torch(x: torch.Tensor, weight: torch.Tensor, splits: int | None = None) -> torch.Tensor:
    if splits is None:
        return F.linear(x, weight)
    size = _slice_size(x.shape[1], splits)
    parts = zip(x.float().split(size, dim=1), weight.float().split(size, dim=1))
    products = [F.linear(x_part, weight_part) for x_part, weight_part in parts]
    products += [torch.zeros_like(products[0])] * (splits - len(products))
    return torch.stack(products)


def split_k_triton(
    x: torch.Tensor, weight: torch.Tensor, splits: int | None = None
) -> torch.Tensor:
    """W x in parts.

    Args:
        x: [rows, in], at most `MAX_ROWS` rows (`MAX_ROWS_IN_PARTS` with splits).
        weight: [out, in].
        splits: into how many slices the inner dimension is cut; None leaves it whole.

    Returns:
        [splits, rows, out] float32, whose sum is the product; without `splits` the product itself,
        [rows, out], in the dtype of x.
    """
    (rows, k), n = x.shape, weight.shape[0]
    shape, dtype = ((rows, n), x.dtype) if splits is None else ((splits, rows, n), torch.float32)
    splits = splits or 1
    out = torch.empty(shape, dtype=dtype, device=x.device)
    _split_k_kernel[(triton.cdiv(n, _TILE), splits)](
        x, weight, out, rows, n, k, _slice_size(k, splits),
        ROWS=max(16, triton.next_power_of_2(rows)), TILE=_TILE,
        BLOCK_K=_BLOCK_K if rows <= MAX_ROWS else _BLOCK_K // 2,
        num_warps=4, num_stages=5, **pdl(x),
    )  # fmt: skip
    return out


def _slice_size(k: int, splits: int) -> int:
    """A multiple of a block; the last slices may be short, or empty."""
    return -(-k // (splits * _BLOCK_K)) * _BLOCK_K


@triton.jit
def _split_k_kernel(
    x_ptr, weight_ptr, out_ptr, rows, n: tl.constexpr, k: tl.constexpr, slice_k: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_next(PDL)
    outs = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * slice_k
    weights = weight_ptr + outs.to(tl.int64)[:, None] * k + cols[None, :]
    xs = x_ptr + row[:, None] * k + cols[None, :]
    even: tl.constexpr = n % TILE == 0 and k % BLOCK_K == 0
    acc = tl.zeros([TILE, ROWS], tl.float32)
    wait_for_previous(PDL)
    for start in range(first, tl.minimum(first + slice_k, k), BLOCK_K):
        if even:
            w = tl.load(weights + start)
            x = tl.load(xs + start, mask=(row < rows)[:, None], other=0.0)
        else:
            inside = (start + cols < k)[None, :]
            w = tl.load(weights + start, mask=(outs < n)[:, None] & inside, other=0.0)
            x = tl.load(xs + start, mask=(row < rows)[:, None] & inside, other=0.0)
        acc = tl.dot(w, tl.trans(x), acc)
    cells = (tl.program_id(1) * rows + row)[None, :] * n + outs[:, None]
    mask = (row < rows)[None, :] & (outs < n)[:, None]
    tl.store(out_ptr + cells, acc.to(out_ptr.dtype.element_ty), mask=mask)
