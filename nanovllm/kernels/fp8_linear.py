"""Products of weights in fp8, by the kernel that `kernels.choice` names.

A GEMV rounds its input to fp8 itself; for the others the norm or the gate before does, or else a
kernel between.
"""

from typing import Any, Protocol

import torch

from nanovllm.kernels.activation import silu_and_mul, silu_and_mul_in_fp8
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


class Gated:
    """silu(gate) * up of a product [rows, 2 n], still to be computed: in fp8 if the next one is."""

    def __init__(self, gate_up: torch.Tensor) -> None:
        self.x = gate_up

    def values(self) -> torch.Tensor:
        return silu_and_mul(self.x)

    def in_fp8(self, group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        return silu_and_mul_in_fp8(self.x, group)


def fp8_product(
    x: torch.Tensor | NormedInput | Gated,
    weight: Fp8Weight,
    bias: torch.Tensor | None,
    *,
    by_split_k: bool,
    by_library: bool,
    gated: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + b, [rows, out], in the dtype of x.

    Args:
        x: [rows, in], or what has still to be normalised or gated to that.
        weight: [out, in].
        bias: [out].
        by_split_k, by_library: by `split_k`, by `torch._scaled_mm`; else by `fp8_gemm`.
        gated: return silu(gate) * up of the halves instead, [rows, out / 2]; by `split_k` only.
        out: the memory of the result if it is to be a given one.
    """
    values, x_scale, dtype = _rounded(x, weight)
    scales = x_scale, weight.scale
    if by_split_k:
        return split_k(
            values, weight.values, bias, gated=gated, out=out, scales=scales, dtype=dtype
        )
    assert not gated, "see Gated"
    if by_library:
        scaled_mm: Any = torch._scaled_mm
        into = {} if out is None else {"out": out}
        y: torch.Tensor = scaled_mm(
            values, weight.values.t(), x_scale, weight.scale.t(), bias=bias, out_dtype=dtype,
            use_fast_accum=True, **into,
        )  # fmt: skip
        return y
    return fp8_gemm(values, weight.values, scales, dtype, bias, out)


def fp8_partial_sums(
    x: torch.Tensor | Gated, weight: Fp8Weight, bias: torch.Tensor | None
) -> torch.Tensor:
    """Summands of x W^T + b, [splits, rows, out] float32, by `split_k`."""
    values, x_scale, dtype = _rounded(x, weight)
    splits = num_splits(weight.values.shape[0])
    return split_k(values, weight.values, bias, splits, scales=(x_scale, weight.scale), dtype=dtype)


def _rounded(
    x: torch.Tensor | NormedInput | Gated, weight: Fp8Weight
) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """An input in fp8, its scales, and what dtype it had."""
    if isinstance(x, torch.Tensor):
        return *quantize_rows(x, weight.group), x.dtype
    return *x.in_fp8(weight.group), x.x.dtype
