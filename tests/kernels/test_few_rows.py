"""Matrix times a few vectors, for small decode batches."""

import pytest
import torch

from helpers.fused_products import check_fused_products
from helpers.kernel_inputs import BF16, FP16, FP32, interpreted, normal, on_cpu_in_fp16
from nanovllm.kernels.few_rows import MAX_IN_FEATURES, MAX_ROWS, few_rows

pytestmark = pytest.mark.usefixtures("poison")


@interpreted
@on_cpu_in_fp16
@pytest.mark.parametrize(
    ("rows", "shape"),
    [(2, (1, 1)), (3, (37, 300)), (1, (5, 1024)), (5, (16, 1032)), (8, (33, 2048)), (7, (9, 2500))],
    ids=str,
)
def test_few_rows(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_fused_products(few_rows, rows, shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 3, 4, 7, MAX_ROWS])
@pytest.mark.parametrize(
    "shape", [(4096, 1024), (1024, 2048), (1024, MAX_IN_FEATURES), (700, 1000)]
)
def test_few_rows_gpu(rows: int, shape: tuple[int, int]) -> None:
    for dtype in (BF16, FP16):
        check_fused_products(few_rows, rows, shape, dtype, "cuda")


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_does_not_depend_on_the_others() -> None:
    x, weight = normal(4, 600, dtype=FP32), normal(7, 600, dtype=FP32, seed=1)
    norm = {"norm_weight": torch.ones(600), "eps": 1e-6}
    all_of_them = few_rows(x, weight, **norm)
    others = torch.cat((x[:1], x[1:] * float("inf")))
    assert torch.equal(few_rows(others, weight, **norm)[0], all_of_them[0])
    assert torch.equal(few_rows(x[:2], weight, **norm), all_of_them[:2])


@pytest.mark.gpu
def test_a_row_does_not_depend_on_their_number_gpu() -> None:
    x, weight = (normal(n, 1024, dtype=BF16, device="cuda", seed=n) for n in (MAX_ROWS, 3072))
    norm = {"norm_weight": normal(1024, dtype=BF16, device="cuda"), "eps": 1e-6}
    all_of_them = few_rows(x, weight, gated=True, **norm)
    for rows in range(1, MAX_ROWS):
        assert torch.equal(few_rows(x[:rows], weight, gated=True, **norm), all_of_them[:rows])
