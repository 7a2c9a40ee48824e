"""Products of weights in fp8, by the kernel that `kernels.linear` has chosen.

A GEMV rounds its input to fp8 itself; for the others the norm before does, or a kernel between.
"""

from typing import Any, Protocol

import torch

from nanovllm.kernels.activation import silu_and_mul
from nanovllm.kernels.fp8_gemm import fp8_gemm
from nanovllm.kernels.fp8_rows import quantize_rows
from nanovllm.kernels.split_k import num_splits, split_k
from nanovllm.quantization.fp8 import Fp8Weight


class NormedInput(Protocol):
    """An input that has still to be normalised: RMSNorm(x + sum of partials) * weight."""

    @property
    def weight(self) -> torch.Tensor: ...

    @property
    def eps(self) -> float: ...

    @property
    def x(self) -> torch.Tensor: ...

    @property
    def partials(self) -> torch.Tensor | None: ...

    def values(self) -> torch.Tensor: ...

    def in_fp8(self, group: int | None) -> tuple[torch.Tensor, torch.Tensor]: ...


def fp8_product(
    x: torch.Tensor | NormedInput,
    weight: Fp8Weight,
    bias: torch.Tensor | None,
    *,
    by_split_k: bool,
    by_library: bool,
    gated: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + b, [rows, out], or with `gated` silu(gate) * up of its halves, in the dtype of x.

    Args:
        x: [rows, in], or what has still to be normalised to that.
        weight: [out, in]; with `gated` [2 * out, in].
        bias: [out]; with `gated` [2 * out].
        by_split_k, by_library: by `split_k`, by `torch._scaled_mm`; else by `fp8_gemm`.
        out: the memory of the result if it is to be a given one, without `gated`.
    """
    if isinstance(x, torch.Tensor):
        dtype = x.dtype
        values, x_scale = quantize_rows(x, weight.group)
    else:
        dtype = x.x.dtype
        values, x_scale = x.in_fp8(weight.group)
    scales = x_scale, weight.scale
    if by_split_k:
        return split_k(
            values, weight.values, bias, gated=gated, out=out, scales=scales, dtype=dtype
        )
    if by_library:
        scaled_mm: Any = torch._scaled_mm
        into = {} if out is None else {"out": out}
        y = scaled_mm(
            values, weight.values.t(), x_scale, weight.scale.t(), bias=bias, out_dtype=dtype,
            use_fast_accum=True, **into,
        )  # fmt: skip
    else:
        y = fp8_gemm(values, weight.values, scales, dtype, bias, out)
    return silu_and_mul(y) if gated else y


def fp8_partial_sums(x: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Summands of x W^T + b, [splits, rows, out] float32, by `split_k`."""
    values, x_scale = quantize_rows(x, weight.group)
    splits = num_splits(weight.values.shape[0])
    return split_k(
        values, weight.values, bias, splits, scales=(x_scale, weight.scale), dtype=x.dtype
    )
