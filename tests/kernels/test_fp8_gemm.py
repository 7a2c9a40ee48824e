"""Weights in fp8 times any number of rows in fp8."""

import pytest
import torch

from helpers.fp8 import GROUP, fp8_weight, rounded
from helpers.kernel_inputs import BF16, FP16, FP32, TOLERANCE, interpreted, normal, relative_error
from nanovllm.kernels import fp8_gemm as fp8_gemm_module
from nanovllm.kernels.fp8_gemm import fp8_gemm
from nanovllm.kernels.fp8_rows import quantize_rows

pytestmark = pytest.mark.usefixtures("poison")


def check_gemm(rows: int, shape: tuple[int, int], dtype, device: str = "cpu") -> None:
    n, k = shape
    x = normal(rows, k, dtype=dtype, device=device)
    x[0], x[-1, k // 2] = 0, 1000
    bias = normal(n, dtype=dtype, device=device, seed=2)
    for group in (None, GROUP):
        weight, exact = fp8_weight(n, k, group, device)
        values, scale = quantize_rows(x, weight.group)
        expected = rounded(x, group).double() @ exact.T
        for b in (None, bias):
            out = torch.empty(rows, n, dtype=dtype, device=device)
            y = fp8_gemm(values, weight.values, (scale, weight.scale), dtype, b, out)
            assert y is out
            assert relative_error(y, expected if b is None else expected + b) < TOLERANCE[dtype]


@interpreted
@pytest.mark.parametrize(
    ("rows", "shape", "dtype"),
    [(5, (70, 300), FP32), (40, (3, 256), FP16), (140, (130, 64), FP32)],
)
def test_gemm(
    monkeypatch: pytest.MonkeyPatch, rows: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Also more tiles of rows than run before the next tile of outputs."""
    monkeypatch.setattr(fp8_gemm_module, "_MOST_ROWS", 32)
    check_gemm(rows, shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "shape", "dtype"),
    [
        (3, (1024, 3072), BF16), (129, (4096, 1024), BF16), (2000, (2560, 9728), BF16),
        (300, (1000, 1000), FP16), (64, (4096, 1024), FP32),
    ],
)  # fmt: skip
def test_gemm_gpu(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_gemm(rows, shape, dtype, "cuda")
