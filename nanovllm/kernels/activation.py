"""The gate of the MLP: silu(gate) * up, gate and up being the halves of one row (SwiGLU, Shazeer
2020, arXiv:2002.05202).

Grid: (row, slice of the row), or in fp8 one program a row, whose numbers have a scale in common.
Bytes moved a row of 2 n elements: reads 2 n, writes n. Bound by memory.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.fp8_rows import empty_rows, store_in_fp8
from nanovllm.kernels.launch import cdiv, launch_dependents, next_power_of_2, pdl, wait
from nanovllm.quantization.fp8 import GROUP

BLOCK = 1024


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """`x` [rows, 2 n] -> [rows, n], computed in float32 and rounded once."""
    rows, n = x.shape[0], x.shape[1] // 2
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    grid = (rows, cdiv(n, BLOCK))
    _silu_and_mul_kernel[grid](x, y, n, BLOCK=BLOCK, num_warps=4, **pdl(x))
    return y


def silu_and_mul_in_fp8(
    x: torch.Tensor, group: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quantize_rows` makes of the result of `silu_and_mul`."""
    rows, n = x.shape[0], x.shape[1] // 2
    values, scale = empty_rows(x[:, :n], group)
    block = next_power_of_2(max(n, GROUP))
    _silu_and_mul_in_fp8_kernel[(rows,)](
        x, values, scale, n, rows, HAS_GROUPS=scale.shape[1] > 1, GROUP=GROUP, BLOCK=block,
        num_warps=min(16, max(1, block // 1024)), **pdl(x),
    )  # fmt: skip
    return values, scale


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up, in float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _silu_and_mul_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    launch_dependents(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n
    gate = tl.load(x_ptr + row * 2 * n + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * n + n + cols, mask=mask, other=0.0).to(tl.float32)
    y = silu_times(gate, up)
    tl.store(y_ptr + row * n + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _silu_and_mul_in_fp8_kernel(
    x_ptr, values_ptr, scale_ptr, n, rows,
    HAS_GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < n
    gate = tl.load(x_ptr + row * 2 * n + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * n + n + cols, mask=mask, other=0.0).to(tl.float32)
    y = silu_times(gate, up).to(x_ptr.dtype.element_ty).to(tl.float32)
    store_in_fp8(y, values_ptr, scale_ptr, row, rows, n, HAS_GROUPS, GROUP, BLOCK)
