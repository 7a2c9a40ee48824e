"""Matrix times a vector or two, for the smallest decode batches."""

import ctypes

import pytest
import torch

from helpers.kernel_inputs import (
    BF16,
    EPS,
    FP16,
    FP32,
    TOLERANCE,
    interpreted,
    normal,
    on_cpu_in_fp16,
    relative_error,
    rms_norm_float64,
)
from nanovllm.kernels import gemv as gemv_module
from nanovllm.kernels.gemv import MAX_ROWS, gemv
from nanovllm.kernels.launch import prefer_shared_memory

pytestmark = pytest.mark.usefixtures("poison")


def check_gemv(rows: int, shape: tuple[int, int], dtype, device: str = "cpu") -> None:
    """Every form of the kernel at one size: plain, with bias, norm, gate and residual."""
    n, k = shape
    x = normal(rows, k, dtype=dtype, device=device)
    weight = normal(2 * n, k, dtype=dtype, device=device, seed=1) / k**0.5
    bias, up_bias = normal(2 * n, dtype=dtype, device=device, seed=2).chunk(2)
    norm_weight = normal(k, dtype=dtype, device=device, seed=3) / 2 + 1
    residual = normal(rows, n, dtype=dtype, device=device, seed=4)
    normed = rms_norm_float64(x, norm_weight, EPS)
    product, up = (x.double() @ part.double().T for part in weight.chunk(2))
    normed_product, normed_up = (normed @ part.double().T for part in weight.chunk(2))
    norm = {"norm_weight": norm_weight, "eps": EPS}

    def check(expected: torch.Tensor, y: torch.Tensor) -> None:
        assert y.dtype == dtype
        assert y.shape == (rows, n)
        assert relative_error(y, expected) < TOLERANCE[dtype]

    check(product, gemv(x, weight[:n]))
    check(product + bias, gemv(x, weight[:n], bias))
    check(normed_product, gemv(x, weight[:n], **norm))
    check(normed_product + bias, gemv(x, weight[:n], bias, **norm))
    check(product.sigmoid() * product * up, gemv(x, weight, gated=True))
    gate = normed_product.sigmoid() * normed_product
    check(gate * normed_up, gemv(x, weight, gated=True, **norm))
    gate = (normed_product + bias).sigmoid() * (normed_product + bias)
    biases = torch.cat((bias, up_bias))
    check(gate * (normed_up + up_bias), gemv(x, weight, biases, gated=True, **norm))
    out = torch.empty_like(residual)
    assert gemv(x, weight[:n], bias, out=out) is out
    check(product + bias, out)
    total = residual.double() + product
    y = residual.clone()
    assert gemv(x, weight[:n], add_to=y) is y
    check(total, y)
    y = residual.clone()
    gemv(x, weight[:n], bias, add_to=y)
    check(total + bias, y)


@interpreted
@on_cpu_in_fp16
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "shape", [(1, 1), (37, 300), (5, 1024), (9, 2048), (5, 2560), (3, 4096), (9, 5000)], ids=str
)
def test_gemv(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_gemv(rows, shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "shape", "dtype"),
    [
        (1, (4096, 1024), BF16),
        (2, (1024, 3072), BF16),
        (1, (2560, 9728), BF16),
        (1, (9728, 2560), BF16),
        (1, (6144, 4096), BF16),
        (MAX_ROWS, (4096, 1024), BF16),
        (1, (40000, 1000), FP16),
        (MAX_ROWS, (3072, 1024), FP32),
    ],
)
def test_gemv_gpu(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_gemv(rows, shape, dtype, "cuda")


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_does_not_depend_on_the_others() -> None:
    x, weight = normal(2, 600, dtype=torch.float32), normal(7, 600, dtype=torch.float32, seed=1)
    both = gemv(x, weight)
    other = gemv(torch.stack((x[0], x[1] * float("inf"))), weight)
    assert torch.equal(both[0], other[0])


@pytest.mark.gpu
def test_gemv_leaves_shared_memory_to_others_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(gemv_module, "prefer_shared_memory", launched.append)
    gemv(normal(1, 512, dtype=BF16, device="cuda"), normal(8, 512, dtype=BF16, device="cuda"))
    prefer_shared_memory(launched[0])
    percent = ctypes.c_int()
    error = ctypes.CDLL("libcuda.so.1").cuFuncGetAttribute(
        ctypes.byref(percent), 9, ctypes.c_void_p(launched[0].function)
    )
    assert (error, percent.value) == (0, 100)
