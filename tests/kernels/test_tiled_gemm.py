"""Matrix times some hundred vectors, and which of them go to this kernel."""

import pytest
import torch
from nanovllm.kernels.tiled_gemm import tiled_gemm_torch, tiled_gemm_triton

from helpers.kernel_inputs import BF16, FP16, interpreted
from helpers.products import check_gate, check_split_k
from nanovllm.kernels import tiled_gemm

pytestmark = pytest.mark.usefixtures("poison")


def test_tiled_gemm_takes_some_hundred_rows_of_small_matrices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.empty(257, 1024, dtype=BF16, device="meta")
    assert not tiled_gemm.can_tile(x[:200], 4096)
    monkeypatch.setattr(tiled_gemm, "has_large_shared_memory", lambda x: True)
    for rows, fits in ((128, False), (129, True), (256, True), (257, False)):
        assert tiled_gemm.can_tile(x[:rows], 8192) == fits
    assert not tiled_gemm.can_tile(x[:200], 8193)
    assert not tiled_gemm.can_tile(x[:200].float(), 4096)
    assert not tiled_gemm.can_tile(x[:200, :100], 4096)


@interpreted
@pytest.mark.parametrize("function", [tiled_gemm_triton, tiled_gemm_torch])
@pytest.mark.parametrize(("rows", "shape"), [(129, (40, 104)), (64, (3, 1000)), (130, (65, 8))])
def test_tiled_gemm(function, rows: int, shape: tuple[int, int]) -> None:
    for splits in (None, 1, 4):
        check_split_k(function, rows, shape, splits, FP16)
    check_gate(function, rows, shape, FP16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("rows", [129, 160, 200, 256])
@pytest.mark.parametrize("shape", [(1024, 3072), (4096, 1024), (1000, 904)])
def test_tiled_gemm_gpu(rows: int, shape: tuple[int, int], dtype) -> None:
    for splits in (None, 1, 4):
        check_split_k(tiled_gemm_triton, rows, shape, splits, dtype, "cuda")
    check_gate(tiled_gemm_triton, rows, shape, dtype, "cuda")
