"""RMSNorm, with and without partial sums to add: the kernel and its twin against float64."""

import pytest
import torch

from helpers.kernel_inputs import (
    EPS,
    FP32,
    TOLERANCE,
    interpreted,
    normal,
    on_cpu,
    on_gpu,
    relative_error,
    rms_norm_float64,
)
from nanovllm.kernels.layernorm import rms_norm as rms_norm_triton
from nanovllm.layers.layernorm import rms_norm as rms_norm_torch

pytestmark = pytest.mark.usefixtures("poison")


def check_rms_norm(rms_norm, rows: int, n: int, dtype: torch.dtype, device: str = "cpu") -> None:
    x = normal(rows, n, dtype=dtype, device=device) * 3
    weight = normal(n, dtype=dtype, device=device, seed=1)
    y = rms_norm(x, weight, EPS)
    assert y.dtype == dtype
    assert relative_error(y, rms_norm_float64(x, weight, EPS)) < TOLERANCE[dtype]

    partials = normal(3, rows, n, dtype=FP32, device=device, seed=2)
    total = x.double() + partials.double().sum(dim=0)
    y = rms_norm(x, weight, EPS, partials)
    assert relative_error(x, total) < TOLERANCE[dtype]
    assert relative_error(y, rms_norm_float64(total, weight, EPS)) < TOLERANCE[dtype]


@interpreted
@on_cpu
@pytest.mark.parametrize("rms_norm", [rms_norm_triton, rms_norm_torch])
@pytest.mark.parametrize(("rows", "n"), [(1, 64), (7, 1000), (5, 1024), (3, 5120), (2, 37)])
def test_rms_norm(rms_norm, rows: int, n: int, dtype: torch.dtype) -> None:
    check_rms_norm(rms_norm, rows, n, dtype)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("rows", "n"), [(1, 1024), (333, 1000), (2048, 5120)])
def test_rms_norm_gpu(rows: int, n: int, dtype: torch.dtype) -> None:
    check_rms_norm(rms_norm_triton, rows, n, dtype, "cuda")


@interpreted
@pytest.mark.parametrize("rms_norm", [rms_norm_triton, rms_norm_torch])
def test_rms_norm_of_zeros_is_zero(rms_norm) -> None:
    y = rms_norm(torch.zeros(2, 64), torch.ones(64), EPS)
    assert torch.equal(y, torch.zeros(2, 64))
