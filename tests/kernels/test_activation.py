"""SiLU times: the kernel and its torch twin against float64."""

from functools import partial

import pytest
import torch

from helpers.kernel_inputs import TOLERANCE, interpreted, normal, on_cpu, on_gpu, relative_error
from nanovllm.kernels.activation import silu_and_mul as silu_and_mul_triton
from nanovllm.layers.activation import activate_and_mul

pytestmark = pytest.mark.usefixtures("poison")


def check_silu_and_mul(silu_and_mul, rows: int, n: int, dtype, device: str = "cpu") -> None:
    x = normal(rows, 2 * n, dtype=dtype, device=device) * 4
    x[0, 0], x[0, 1] = -100.0, 100.0  # where exp overflows, and where it vanishes
    y = silu_and_mul(x)
    gate, up = x.double().split(n, dim=1)
    assert y.dtype == dtype
    assert relative_error(y, gate * up / (1 + (-gate).exp())) < TOLERANCE[dtype]


@interpreted
@on_cpu
@pytest.mark.parametrize(
    "silu_and_mul", [silu_and_mul_triton, partial(activate_and_mul, activation="silu")]
)
@pytest.mark.parametrize(("rows", "n"), [(1, 2), (3, 1000), (2, 1024), (2, 3072)])
def test_silu_and_mul(silu_and_mul, rows: int, n: int, dtype: torch.dtype) -> None:
    check_silu_and_mul(silu_and_mul, rows, n, dtype)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("rows", "n"), [(1, 3072), (777, 1000), (2048, 9728)])
def test_silu_and_mul_gpu(rows: int, n: int, dtype: torch.dtype) -> None:
    check_silu_and_mul(silu_and_mul_triton, rows, n, dtype, "cuda")
