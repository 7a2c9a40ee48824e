"""Matrix times some dozen vectors, in slices, and which of them go to this kernel."""

import pytest

from helpers.kernel_inputs import BF16, FP16, interpreted, normal
from helpers.products import check_gate, check_split_k
from nanovllm.kernels import split_k as split_k_module
from nanovllm.kernels.split_k import num_splits, split_k, tiling

pytestmark = pytest.mark.usefixtures("poison")


@interpreted
@pytest.mark.parametrize("splits", [None, 1, 3, 8])
@pytest.mark.parametrize(
    "rows_and_shape",
    [(5, (64, 256)), (5, (64, 300)), (5, (65, 256)), (20, (65, 300)), (65, (3, 1000))],
)
def test_split_k(rows_and_shape: tuple[int, tuple[int, int]], splits: int | None) -> None:
    check_split_k(split_k, *rows_and_shape, splits, FP16)
    if splits is None:
        check_gate(split_k, *rows_and_shape, FP16)


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
        check_split_k(split_k, rows, shape, splits, dtype, "cuda")
    check_gate(split_k, rows, shape, dtype, "cuda")


def test_slices_give_each_multiprocessor_a_program() -> None:
    splits = {outputs: num_splits(outputs) for outputs in (64, 1024, 1025, 4096, 8193)}
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

    monkeypatch.setattr(split_k_module, "prefetch", record)
    weight = normal(n, k, dtype=FP16)
    start, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    for rows in (5, 128):
        split_k(normal(rows, k, dtype=FP16), weight, **form)
        outputs = n // 2 if "gated" in form else n
        is_even = outputs % (32 if "gated" in form else 64) == 0
        assert bool(fetched) == is_even
        for at, num_bytes in fetched:
            assert at >= start
            assert at + num_bytes <= end
            assert (at - start) % 16 == num_bytes % 16 == 0
        # the first two blocks of each row of the weight, where a slice has as many
        block = tiling(rows)[1] * weight.itemsize
        firsts = {start + row * k * weight.itemsize for row in range(n)} if is_even else set()
        assert firsts <= {at for at, _ in fetched}
        assert {num_bytes for _, num_bytes in fetched} <= {block}
        if is_even and k * weight.itemsize > block:
            assert {at + block for at in firsts} <= {at for at, _ in fetched}
        fetched.clear()
