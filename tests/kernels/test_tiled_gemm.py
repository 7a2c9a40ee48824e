"""Matrix times some hundred vectors, in tiles."""

import pytest

from helpers.kernel_inputs import BF16, FP16, interpreted
from helpers.products import check_gate, check_split_k
from nanovllm.kernels.tiled_gemm import tiled_gemm

pytestmark = pytest.mark.usefixtures("poison")


@interpreted
@pytest.mark.parametrize(("rows", "shape"), [(129, (40, 104)), (64, (3, 1000)), (130, (65, 8))])
def test_tiled_gemm(rows: int, shape: tuple[int, int]) -> None:
    for splits in (None, 1, 4):
        check_split_k(tiled_gemm, rows, shape, splits, FP16, has_bias=False)
    check_gate(tiled_gemm, rows, shape, FP16, has_bias=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("rows", [129, 160, 200, 256])
@pytest.mark.parametrize("shape", [(1024, 3072), (4096, 1024), (1000, 904)])
def test_tiled_gemm_gpu(rows: int, shape: tuple[int, int], dtype) -> None:
    for splits in (None, 1, 4):
        check_split_k(tiled_gemm, rows, shape, splits, dtype, "cuda", has_bias=False)
    check_gate(tiled_gemm, rows, shape, dtype, "cuda", has_bias=False)
