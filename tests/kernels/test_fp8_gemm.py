"""Weights in fp8 times any number of rows in fp8."""

import pytest
import torch

from helpers.fp8 import GROUP, fp8_weight, rounded
from helpers.kernel_inputs import BF16, FP16, FP32, TOLERANCE, interpreted, normal, relative_error
from nanovllm.kernels.fp8_gemm import fp8_gemm
from nanovllm.kernels.fp8_linear import fp8_partial_sums, fp8_product
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
    [(5, (70, 300), FP32), (130, (3, 256), FP16), (1100, (3, 64), FP16)],
)
def test_gemm(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
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


WAYS = {
    "split_k": {"by_split_k": True, "by_library": False},
    "library": {"by_split_k": False, "by_library": True},
    "gemm": {"by_split_k": False, "by_library": False},
}


def check_ways(ways: list[str], rows: int, n: int, k: int, dtype, device: str = "cpu") -> None:
    """Every way to a product gives it, its gate, and its summands."""
    x = normal(rows, k, dtype=dtype, device=device)
    bias = normal(2 * n, dtype=dtype, device=device, seed=2)
    weight, exact = fp8_weight(2 * n, k, None, device)
    product = rounded(x).double() @ exact.T + bias
    gate, up = product.chunk(2, dim=1)
    for way in ways:
        options = WAYS[way]
        out = torch.empty(rows, 2 * n, dtype=dtype, device=device)
        assert fp8_product(x, weight, bias, **options, out=out) is out
        assert relative_error(out, product) < TOLERANCE[dtype]
        gated = fp8_product(x, weight, bias, **options, gated=True)
        assert gated.dtype == dtype
        assert relative_error(gated, gate.sigmoid() * gate * up) < TOLERANCE[dtype]
    partials = fp8_partial_sums(x, weight, bias)
    assert partials.dtype == FP32
    assert relative_error(partials.sum(dim=0), product) < TOLERANCE[dtype]


@interpreted
def test_every_way_gives_the_product() -> None:
    check_ways(["split_k", "gemm"], 5, 40, 300, FP32)


@pytest.mark.gpu
def test_every_way_gives_the_product_gpu() -> None:
    check_ways([*WAYS], 100, 1024, 2048, BF16, "cuda")
