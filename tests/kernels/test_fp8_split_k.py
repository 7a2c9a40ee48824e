"""Weights in fp8 times some dozen vectors in fp8, in slices."""

import pytest
import torch

from helpers.fp8 import GROUP, fp8_weight, rounded
from helpers.kernel_inputs import BF16, FP16, FP32, TOLERANCE, interpreted, normal, relative_error
from nanovllm.kernels import split_k as split_k_module
from nanovllm.kernels.fp8_rows import quantize_rows
from nanovllm.kernels.split_k import fp8_tiling, split_k

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


@interpreted
@pytest.mark.parametrize("rows", [5, 65])
def test_many_programs(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_k_module, "MANY_PROGRAMS", 1)
    check_split_k(rows, (5, 600), 2, FP32)


@pytest.mark.parametrize("programs", [1, 10**6])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 128])
def test_a_block_is_one_group_and_cuts_no_slice(rows: int, programs: int) -> None:
    assert fp8_tiling(rows, 512, programs, has_groups=True)[0] == GROUP
    for slice_k in (128, 256, 384, 512):
        assert slice_k % fp8_tiling(rows, slice_k, programs, has_groups=False)[0] == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "shape", "dtype"),
    [
        (3, (1024, 3072), BF16), (16, (4096, 1024), FP32), (32, (9728, 2560), BF16),
        (64, (1000, 9000), BF16), (128, (4096, 1024), FP32), (128, (1024, 12288), BF16),
        (32, (24576, 1024), BF16),
    ],
)  # fmt: skip
def test_split_k_gpu(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    for splits in (None, 8):
        check_split_k(rows, shape, splits, dtype, "cuda")
    check_gate(rows, shape, dtype, "cuda")
