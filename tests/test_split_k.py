"""Matrix times some dozen or hundred vectors, by `split_k` and `tiled_gemm`, and where they run."""

from types import SimpleNamespace

import pytest
import torch

from helpers.kernel_inputs import BF16, FP16, FP32, TOLERANCE, interpreted, normal, relative_error
from nanovllm.kernels import _triton, split_k, tiled_gemm
from nanovllm.kernels._triton import has_large_shared_memory, has_pdl
from nanovllm.kernels.split_k import split_k_torch, split_k_triton
from nanovllm.kernels.tiled_gemm import tiled_gemm_torch, tiled_gemm_triton

pytestmark = pytest.mark.usefixtures("poison")


def check_split_k(function, rows: int, shape: tuple[int, int], splits, dtype, device="cpu"):
    n, k = shape
    x = normal(rows, k, dtype=dtype, device=device)
    weight = normal(n, k, dtype=dtype, device=device, seed=1)
    expected = x.double() @ weight.double().T
    out = function(x, weight, splits)
    if splits is None:
        assert out.dtype == dtype
    else:
        assert out.dtype == FP32
        assert out.shape == (splits, rows, n)
        out = out.sum(dim=0)
    assert relative_error(out, expected) < TOLERANCE[dtype]


@interpreted
@pytest.mark.parametrize("function", [split_k_triton, split_k_torch])
@pytest.mark.parametrize("splits", [None, 1, 3, 8])
@pytest.mark.parametrize(
    "rows_and_shape",
    [(5, (64, 256)), (5, (64, 300)), (5, (65, 256)), (20, (65, 300)), (65, (3, 1000))],
)
def test_split_k(function, rows_and_shape: tuple[int, tuple[int, int]], splits: int | None) -> None:
    check_split_k(function, *rows_and_shape, splits, FP16)
    if splits is None:
        check_gate(function, *rows_and_shape, FP16)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "shape", "dtype"),
    [
        (3, (1024, 3072), BF16), (16, (4096, 1024), BF16), (32, (9728, 2560), BF16),
        (64, (1000, 9000), BF16), (128, (4096, 1024), BF16), (128, (1024, 9000), FP16),
    ],
)  # fmt: skip
def test_split_k_gpu(rows: int, shape: tuple[int, int], dtype) -> None:
    for splits in (None, 8):
        check_split_k(split_k_triton, rows, shape, splits, dtype, "cuda")
    check_gate(split_k_triton, rows, shape, dtype, "cuda")


@pytest.mark.parametrize(
    ("out_features", "in_parts", "most"),
    [(2**15, False, 128), (2**15 + 1, False, 64), (2**15 + 1, True, 128)],
)
def test_split_k_takes_few_rows(
    monkeypatch: pytest.MonkeyPatch, out_features: int, in_parts: bool, most: int
) -> None:
    monkeypatch.setattr(split_k, "has_large_shared_memory", lambda x: True)
    for rows in (1, most, most + 1):
        x = torch.empty(rows, 1024, dtype=BF16, device="meta")
        assert split_k.can_split_k(x, out_features, in_parts) == (rows <= most)
    assert not split_k.can_split_k(x[:1].float(), out_features, in_parts)


def test_slices_give_each_multiprocessor_a_program() -> None:
    splits = {outputs: split_k.num_splits(outputs) for outputs in (64, 1024, 1025, 4096, 8193)}
    assert splits == {64: 8, 1024: 8, 1025: 7, 4096: 2, 8193: 1}


@interpreted
@pytest.mark.parametrize(("n", "k"), [(64, 128), (64, 1024), (96, 384), (128, 2560), (66, 256)])
@pytest.mark.parametrize("form", [{}, {"splits": 8}, {"gated": True}], ids=str)
def test_split_k_fetches_nothing_but_the_weight(
    monkeypatch: pytest.MonkeyPatch, n: int, k: int, form: dict[str, int]
) -> None:
    fetched = []  # (address, bytes)

    def record(addresses, num_bytes, PDL):
        fetched.extend((int(at), int(num_bytes)) for at in addresses.handle.data.flat)

    monkeypatch.setattr(split_k, "prefetch", record)
    weight = normal(n, k, dtype=FP16)
    start, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    for rows in (5, 128):
        split_k_triton(normal(rows, k, dtype=FP16), weight, **form)
        outputs = n // 2 if "gated" in form else n
        is_even = outputs % (32 if "gated" in form else 64) == 0
        assert bool(fetched) == is_even
        for at, num_bytes in fetched:
            assert at >= start
            assert at + num_bytes <= end
            assert (at - start) % 16 == num_bytes % 16 == 0
        # the first two blocks of each row of the weight, where a slice has as many
        block = split_k.tiling(rows)[1] * weight.itemsize
        firsts = {start + row * k * weight.itemsize for row in range(n)} if is_even else set()
        assert firsts <= {at for at, _ in fetched}
        assert {num_bytes for _, num_bytes in fetched} <= {block}
        if is_even and k * weight.itemsize > block:
            assert {at + block for at in firsts} <= {at for at, _ in fetched}
        fetched.clear()


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


@pytest.mark.parametrize(
    ("capability", "kibibytes", "is_large"),
    [((8, 0), 164, False), ((9, 0), 228, True), ((10, 0), 228, True), ((12, 0), 100, False)],
)
def test_tiles_for_hopper_go_to_no_smaller_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kibibytes: int, is_large: bool
) -> None:
    properties = SimpleNamespace(shared_memory_per_multiprocessor=kibibytes * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), get_device=lambda: 0)
    has_pdl.cache_clear()
    try:
        assert has_large_shared_memory(tensor) == is_large
        has_pdl.cache_clear()
        monkeypatch.setattr(_triton, "HAS_TRITON", False)
        assert not has_large_shared_memory(tensor)
    finally:
        has_pdl.cache_clear()
    assert not has_large_shared_memory(torch.zeros(1))


def check_gate(function, rows: int, shape: tuple[int, int], dtype, device="cpu") -> None:
    n, k = shape
    x = normal(rows, k, dtype=dtype, device=device)
    weight = normal(2 * n, k, dtype=dtype, device=device, seed=1) / k**0.5
    gate, up = (x.double() @ part.double().T for part in weight.chunk(2))
    out = function(x, weight, gated=True)
    assert out.dtype == dtype
    assert out.shape == (rows, n)
    assert relative_error(out, gate.sigmoid() * gate * up) < TOLERANCE[dtype]


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
