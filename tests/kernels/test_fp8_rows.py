"""Activations in fp8, against the formula in torch."""

import pytest
import torch

from helpers.kernel_inputs import (
    BF16,
    EPS,
    FP16,
    FP32,
    interpreted,
    normal,
    on_cpu,
    rms_norm_float64,
)
from nanovllm.kernels.activation import silu_and_mul, silu_and_mul_in_fp8
from nanovllm.kernels.fp8_rows import quantize_rows
from nanovllm.kernels.layernorm import rms_norm, rms_norm_in_fp8
from nanovllm.quantization.fp8 import FP8, GROUP, dequantize, quantize

pytestmark = pytest.mark.usefixtures("poison")


def hostile(rows: int, n: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Rows of zeros, of one number that outweighs all, of huge and of tiny numbers, and of ties."""
    x = normal(rows, n, dtype=FP32)
    x[0] = 0
    x[1 % rows, n // 2] = 1e4
    x[2 % rows] *= 65504 / x[2 % rows].abs().max()
    x[3 % rows] *= 1e-7
    x[4 % rows] = torch.arange(n) % 257 * 1.0
    return x.to(dtype).to(device)


def check_rows(rows: int, n: int, dtype: torch.dtype, device: str = "cpu") -> None:
    x = hostile(rows, n, dtype, device)
    for group in (None, GROUP):
        values, scale = quantize_rows(x, group)
        expected, expected_scale = quantize(x.cpu(), group)
        assert values.dtype == FP8 and values.is_contiguous()
        assert torch.equal(values.cpu().float(), expected.float())
        assert torch.equal(scale.cpu(), expected_scale)


@interpreted
@on_cpu
@pytest.mark.parametrize(("rows", "n"), [(7, 256), (5, 300), (6, 1), (1, 1000), (5, 64)])
def test_rows(rows: int, n: int, dtype: torch.dtype) -> None:
    check_rows(rows, n, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize(("rows", "n"), [(7, 1024), (300, 12288), (5, 27648), (6, 100)])
def test_rows_gpu(rows: int, n: int, dtype: torch.dtype) -> None:
    check_rows(rows, n, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("not_finite", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_lost_gpu(not_finite: float) -> None:
    x = torch.ones(2, 512, dtype=BF16, device="cuda")
    x[0, 3] = not_finite
    for group in (None, GROUP):
        values, scale = quantize_rows(x, group)
        found = values.float() * scale[:, :1]
        assert not found[0].isfinite().all() and found[1].isfinite().all()


def check_rounded_norm(
    fp8: tuple[torch.Tensor, torch.Tensor],
    exact: torch.Tensor,
    dtype: torch.dtype,
    group: int | None,
) -> None:
    """The norm in float32 is off by 2^-20 at most, in whatever order a kernel adds up the squares.
    Rounding, to `dtype` and then to fp8, keeps order: what is rounded lies between the bounds
    rounded. Nearly everywhere these are the same number."""
    bounds = [quantize((exact * (1 + side * 2.0**-20)).to(dtype), group) for side in (-1, 1)]
    low, high = torch.stack([dequantize(*bound) for bound in bounds]).aminmax(dim=0)
    found = dequantize(*fp8)
    assert ((low <= found) & (found <= high)).all()
    assert (low < high).sum() < 4 + 1e-4 * found.numel()
    assert ((fp8[1] == bounds[0][1]) | (fp8[1] == bounds[1][1])).all()


def check_norm_and_gate(rows: int, n: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """In fp8 the results of the norm, and of the gate, are what comes out in two steps."""
    weight = normal(n, dtype=dtype, device=device, seed=1)
    for partials in (None, normal(3, rows, n, dtype=FP32, device=device, seed=2)):
        for group in (None, GROUP):
            x, again = (hostile(rows, n, dtype, device) for _ in range(2))
            rms_norm(x, weight, EPS, partials)
            fp8 = rms_norm_in_fp8(again, weight, EPS, partials, group)
            assert torch.equal(x, again)
            check_rounded_norm(fp8, rms_norm_float64(x, weight, EPS), dtype, group)
            both = torch.cat((x / 100, again), dim=1)  # gate and up
            expected = quantize_rows(silu_and_mul(both), group)
            values, scale = silu_and_mul_in_fp8(both, group)
            assert torch.equal(values.float(), expected[0].float())
            assert torch.equal(scale, expected[1])


@interpreted
@pytest.mark.parametrize(("rows", "n", "dtype"), [(6, 300, FP32), (5, 64, FP16)])
def test_norm_and_gate(rows: int, n: int, dtype: torch.dtype) -> None:
    check_norm_and_gate(rows, n, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "n"), [(7, 1024), (300, 4096), (6, 100)])
def test_norm_and_gate_gpu(rows: int, n: int) -> None:
    check_norm_and_gate(rows, n, BF16, "cuda")
