"""Weights in fp8 times some dozen vectors in fp8, in slices."""

import pytest
import torch

from helpers.fp8 import GROUP, fp8_weight, rounded
from helpers.kernel_inputs import BF16, FP16, FP32, TOLERANCE, interpreted, normal, relative_error
from nanovllm.kernels.fp8_rows import quantize_rows
from nanovllm.kernels.split_k import split_k

pytestmark = pytest.mark.usefixtures("poison")


def check_split_k(
    rows: int, shape: tuple[int, int], splits: int | None, dtype, device: str = "cpu"
) -> None:
    n, k = shape
    x = normal(rows, k, dtype=dtype, device=device)
    x[0], x[-1, k // 2] = 0, 1000
    for group in (None, GROUP):
        weight, exact = fp8_weight(n, k, group, device)
        values, scale = quantize_rows(x, weight.group)
        bias = normal(n, dtype=dtype, device=device, seed=2)
        for b in (None, bias):
            expected = rounded(x, group).double() @ exact.T + (0 if b is None else b.double())
            out = split_k(
                values, weight.values, b, splits, scales=(scale, weight.scale), dtype=dtype
            )
            assert out.dtype == (dtype if splits is None else FP32)
            out = out if splits is None else out.sum(dim=0)
            assert relative_error(out, expected) < TOLERANCE[dtype]


def check_gate(rows: int, shape: tuple[int, int], dtype, device: str = "cpu") -> None:
    n, k = shape
    x = normal(rows, k, dtype=dtype, device=device)
    for group in (None, GROUP):
        weight, exact = fp8_weight(2 * n, k, group, device)
        values, scale = quantize_rows(x, weight.group)
        gate, up = (rounded(x, group).double() @ exact.T).chunk(2, dim=1)
        out = split_k(values, weight.values, gated=True, scales=(scale, weight.scale), dtype=dtype)
        assert relative_error(out, gate.sigmoid() * gate * up) < TOLERANCE[dtype]


@interpreted
@pytest.mark.parametrize(
    ("rows", "shape", "splits"),
    [
        (5, (64, 512), None), (5, (65, 300), None), (5, (64, 512), 1), (5, (65, 768), 3),
        (20, (5, 300), 8), (65, (3, 600), 2),
    ],
)  # fmt: skip
def test_split_k(rows: int, shape: tuple[int, int], splits: int | None) -> None:
    check_split_k(rows, shape, splits, FP16)
    if splits is None:
        check_gate(rows, shape, FP16)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "shape", "dtype"),
    [
        (3, (1024, 3072), BF16), (16, (4096, 1024), FP32), (32, (9728, 2560), BF16),
        (64, (1000, 9000), BF16), (128, (4096, 1024), FP32), (128, (1024, 12288), BF16),
    ],
)  # fmt: skip
def test_split_k_gpu(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    for splits in (None, 8):
        check_split_k(rows, shape, splits, dtype, "cuda")
    check_gate(rows, shape, dtype, "cuda")
