"""Rows of activations in fp8; see `quantization.fp8` for the numbers.

Each row, or each group of 128 numbers of one, is divided by the least power of two with which its
largest number is at most 448, and rounded to e4m3.

Grid: one program a row. Bytes moved: x read, and half of it written, or a quarter of float32.
Bound by memory, and by launch latency at small batches.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.launch import launch_dependents, next_power_of_2, pdl, wait
from nanovllm.kernels.paged_cache import as_stored
from nanovllm.quantization.fp8 import FP8, GROUP, num_groups

# Triton's interpreter rounds to e4m3 in its own way.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def quantize_rows(x: torch.Tensor, group: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, n] as e4m3 [rows, n], and its scales float32 [rows, 1], or with `group`, which is
    `GROUP`, one for so many numbers, [rows, n / group]. Scales of many rows are side by side."""
    rows, n = x.shape
    values, scale = empty_rows(x, group)
    block = next_power_of_2(max(n, GROUP))
    _quantize_rows_kernel[(rows,)](
        x, values, scale, rows, n, HAS_GROUPS=scale.shape[1] > 1, GROUP=GROUP, BLOCK=block,
        num_warps=min(16, max(1, block // 1024)), **pdl(x),
    )  # fmt: skip
    return values, scale


def empty_rows(x: torch.Tensor, group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for what `quantize_rows` returns."""
    rows, n = x.shape
    values = torch.empty(rows, n, dtype=FP8, device=x.device)
    scale = torch.empty(num_groups(n, group), rows, dtype=torch.float32, device=x.device)
    return values, scale.t()


@triton.jit
def _quantize_rows_kernel(
    x_ptr, values_ptr, scale_ptr, rows, n,
    HAS_GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + cols, mask=cols < n, other=0.0).to(tl.float32)
    store_in_fp8(x, values_ptr, scale_ptr, row, rows, n, HAS_GROUPS, GROUP, BLOCK)


@triton.jit
def store_in_fp8(
    x, values_ptr, scale_ptr, row, rows, n,
    HAS_GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantise a row of float32 numbers, [BLOCK] with zeros at the end."""
    if HAS_GROUPS:
        x = tl.reshape(x, [BLOCK // GROUP, GROUP])
        scale, inverse = scales_of(tl.max(tl.abs(x), axis=1))
        x = tl.reshape(x * inverse[:, None], [BLOCK])
        group = tl.arange(0, BLOCK // GROUP)
        tl.store(scale_ptr + group * rows + row, scale, mask=group * GROUP < n)
    else:
        scale, inverse = scales_of(tl.max(tl.abs(x), axis=0))
        x *= inverse
        tl.store(scale_ptr + row, scale)
    cols = tl.arange(0, BLOCK)
    tl.store(values_ptr + row * n + cols, to_fp8(x), mask=cols < n)


@triton.jit
def scales_of(largest):
    """The scales of rows whose largest numbers these are, and their inverses."""
    least = tl.maximum(largest * (1 / 448), 2.0**-100)
    bits = (least.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000  # the next power of two
    inverse = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    return bits.to(tl.float32, bitcast=True), inverse


@triton.jit
def as_factor(x, EXACT: tl.constexpr):
    """Numbers of e4m3 as `tl.dot` is to multiply them. Tensor cores add up products of fp8 in fewer
    digits than float32 has; float16 holds the same numbers, and sums of its products are exact."""
    return x.to(tl.float16) if EXACT else x


@triton.jit
def to_fp8(x):
    """float32 of at most 448 as e4m3, rounded to the nearest, ties to even."""
    if _INTERPRETED:
        return as_stored(x, 1.0, tl.float8e4nv)
    return x.to(tl.float8e4nv)
