"""Matrix in fp8 times a vector or two, for the smallest decode batches."""

import pytest
import torch

from helpers.fp8 import GROUP, fp8_weight, rounded
from helpers.kernel_inputs import (
    BF16,
    EPS,
    FP16,
    FP32,
    interpreted,
    normal,
    relative_error,
    rms_norm_float64,
)
from nanovllm.kernels import fp8_gemv as fp8_gemv_module
from nanovllm.kernels.fp8_gemv import MAX_ROWS, fp8_gemv, tiling
from nanovllm.quantization.fp8 import Fp8Weight

pytestmark = pytest.mark.usefixtures("poison")
# A number on the border between two of e4m3 may go to either, if the norm's sum is in another order
# or precision.
TOLERANCE = {FP32: 1e-3, FP16: 1e-2, BF16: 2e-2}


def check_gemv(
    rows: int, shape: tuple[int, int], dtype, group: int | None, device: str = "cpu"
) -> None:
    """Every form of the kernel at one size: plain, with bias, norm, gate and residual."""
    n, k = shape
    x = normal(rows, k, dtype=dtype, device=device)
    x[0, k // 3] = 50  # it outweighs the others
    whole, exact = fp8_weight(2 * n, k, group, device)
    half = Fp8Weight(whole.values[:n], _side_by_side(whole.scale[:n]))
    bias, up_bias = normal(2 * n, dtype=dtype, device=device, seed=2).chunk(2)
    norm_weight = normal(k, dtype=dtype, device=device, seed=3) / 2 + 1
    residual = normal(rows, n, dtype=dtype, device=device, seed=4)
    normed = rounded(rms_norm_float64(x, norm_weight, EPS).to(dtype), group).double()
    product, up = (rounded(x, group).double() @ part.T for part in exact.chunk(2))
    normed_product, normed_up = (normed @ part.T for part in exact.chunk(2))
    norm = {"norm_weight": norm_weight, "eps": EPS}

    def check(expected: torch.Tensor, y: torch.Tensor) -> None:
        assert y.dtype == dtype
        assert y.shape == (rows, n)
        assert relative_error(y, expected) < TOLERANCE[dtype]

    check(product, fp8_gemv(x, half))
    check(normed_product + bias, fp8_gemv(x, half, bias, **norm))
    check(product.sigmoid() * product * up, fp8_gemv(x, whole, gated=True))
    gate = (normed_product + bias).sigmoid() * (normed_product + bias)
    biases = torch.cat((bias, up_bias))
    check(gate * (normed_up + up_bias), fp8_gemv(x, whole, biases, gated=True, **norm))
    out = torch.empty_like(residual)
    assert fp8_gemv(x, half, bias, out=out) is out
    check(product + bias, out)
    y = residual.clone()
    assert fp8_gemv(x, half, bias, add_to=y) is y
    check(residual.double() + product + bias, y)


def _side_by_side(scale: torch.Tensor) -> torch.Tensor:
    return scale.t().contiguous().t()


@interpreted
@pytest.mark.parametrize(
    ("rows", "shape", "dtype", "group"),
    [
        (1, (1, 1), FP32, None), (2, (19, 300), FP32, None), (1, (9, 1024), FP16, None),
        (1, (5, 2560), FP32, None), (2, (5, 300), FP16, GROUP), (1, (9, 1000), FP32, GROUP),
        (1, (3, 3200), FP32, GROUP),
    ],
    ids=str,
)  # fmt: skip
def test_gemv(rows: int, shape: tuple[int, int], dtype: torch.dtype, group: int | None) -> None:
    check_gemv(rows, shape, dtype, group)


@interpreted
def test_gemv_with_many_outputs_of_a_warp(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiling(1024, 4096, gated=False) == ((1024,), 1, 4)
    assert tiling(3000, 1024, gated=False) == ((1024, 1024, 1024), 3, 2)
    monkeypatch.setattr(fp8_gemv_module, "tiling", lambda *_: ((512, 512), 2, 4))
    check_gemv(1, (20, 1000), FP32, None)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [None, GROUP])
@pytest.mark.parametrize(
    ("rows", "shape", "dtype"),
    [
        (1, (4096, 1024), BF16), (2, (1024, 3072), BF16), (1, (2560, 9728), BF16),
        (1, (6144, 4096), BF16), (MAX_ROWS, (4096, 1024), BF16), (1, (4096, 12288), BF16),
        (1, (40000, 1000), FP16), (MAX_ROWS, (3072, 1024), FP32),
    ],
)  # fmt: skip
def test_gemv_gpu(rows: int, shape: tuple[int, int], dtype: torch.dtype, group: int | None) -> None:
    check_gemv(rows, shape, dtype, group, "cuda")


@interpreted
def test_zeros_give_zeros() -> None:
    weight, _ = fp8_weight(8, 600, None)
    for norm in ({}, {"norm_weight": torch.ones(600), "eps": EPS}):
        assert not fp8_gemv(torch.zeros(2, 600), weight, **norm).any()


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_row_does_not_depend_on_the_others() -> None:
    x = normal(2, 600, dtype=FP32)
    for group in (None, GROUP):
        weight, _ = fp8_weight(7, 600, group)
        both = fp8_gemv(x, weight)
        other = fp8_gemv(torch.stack((x[0], x[1] * float("inf"))), weight)
        assert torch.equal(both[0], other[0])
        assert not other[1].isfinite().all()


def check_not_finite(value: float, dtype: torch.dtype, device: str = "cpu") -> None:
    """It is not lost on the way through fp8, and there are no others."""
    x = normal(2, 600, dtype=dtype, device=device)
    x[1, 5] = value
    for group in (None, GROUP):
        weight, _ = fp8_weight(8, 600, group, device)
        ones = torch.ones(600, dtype=dtype, device=device)
        for norm in ({}, {"norm_weight": ones, "eps": EPS}):
            y = fp8_gemv(x, weight, **norm)
            assert y[0].isfinite().all()
            assert not y[1].isfinite().any() or (not norm and not y[1].isfinite().all())
        norm = ones.clone()
        norm[7] = value
        assert not fp8_gemv(x[:1], weight, norm_weight=norm, eps=EPS).isfinite().any()


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_is_not_lost() -> None:
    check_not_finite(float("inf"), FP32)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_lost_gpu(value: float) -> None:
    check_not_finite(value, BF16, "cuda")
