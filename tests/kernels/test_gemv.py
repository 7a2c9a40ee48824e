"""Matrix times a vector or two, for the smallest decode batches."""

import ctypes

import pytest
import torch

from helpers.fused_products import check_fused_products
from helpers.kernel_inputs import BF16, FP16, FP32, interpreted, normal, on_cpu_in_fp16
from nanovllm.kernels import gemv as gemv_module
from nanovllm.kernels.gemv import MAX_ROWS, gemv
from nanovllm.kernels.launch import prefer_shared_memory

pytestmark = pytest.mark.usefixtures("poison")


@interpreted
@on_cpu_in_fp16
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "shape", [(1, 1), (37, 300), (5, 1024), (9, 2048), (5, 2560), (3, 4096), (9, 5000)], ids=str
)
def test_gemv(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_fused_products(gemv, rows, shape, dtype)


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
    check_fused_products(gemv, rows, shape, dtype, "cuda")


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
