"""Products of a layer whose weight is in fp8, by every kernel that may be chosen."""

import pytest
import torch
import torch.nn.functional as F

from helpers.fp8 import GROUP, fp8_weight, rounded
from helpers.kernel_inputs import BF16, EPS, FP32, interpreted, normal, relative_error
from nanovllm.kernels import linear as kernels_linear
from nanovllm.kernels.choice import Kernel
from nanovllm.layers.deferred import Stream
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.quantization.fp8 import Fp8Weight

KERNELS = [Kernel.GEMV, Kernel.SPLIT_K, Kernel.FP8_GEMM, Kernel.LIBRARY]


def check_kernel(
    kernel: Kernel, group: int | None, has_bias: bool, rows: int, n: int, k: int, dtype, device: str
) -> None:
    """A bias, a norm, partial sums, a gate, a residual: nothing is dropped on the way."""
    tolerance = 1e-3 if dtype is FP32 else 3e-2
    weight, exact = fp8_weight(2 * n, k, group, device)
    x = normal(rows, k, dtype=dtype, device=device)
    partials = normal(2, rows, k, dtype=FP32, device=device, seed=4)
    bias = normal(2 * n, dtype=dtype, device=device, seed=2) if has_bias else None
    norm = RMSNorm(k, EPS).requires_grad_(False).to(device, dtype)
    norm.weight.uniform_(0.5, 1.5)

    def normed() -> tuple[object, torch.Tensor]:
        own = None if kernel is Kernel.GEMV else partials  # which it is not chosen for
        total = x if own is None else (x.float() + own.sum(dim=0)).to(dtype)
        return norm(Stream(x.clone(), own)), F.rms_norm(total, (k,), norm.weight, EPS)

    def product(values: torch.Tensor) -> torch.Tensor:
        return rounded(values, group).double() @ exact.T + (bias.double() if has_bias else 0)

    def check(found: torch.Tensor, expected: torch.Tensor) -> None:
        assert found.dtype == dtype
        assert relative_error(found, expected) < tolerance

    deferred, values = normed()
    expected = product(values)
    check(kernels_linear.matmul(deferred, weight, bias), expected)
    out = torch.empty(rows, 2 * n, dtype=dtype, device=device)
    assert kernels_linear.matmul(x, weight, bias, out) is out
    check(out, product(x))
    gate, up = expected.chunk(2, dim=1)
    deferred, _ = normed()
    gated = kernels_linear.gated_matmul(deferred, weight, bias)
    check_gated(gated, gate.sigmoid() * gate * up, weight, n, tolerance)
    stream = normal(rows, 2 * n, dtype=dtype, device=device, seed=5)
    before = stream.clone()
    left = kernels_linear.add_matmul(stream, x, weight, bias)
    check(Stream(stream, left).values(), before.double() + product(x))
    summands = kernels_linear.summands(x, weight, bias)
    check(summands.sum(dim=0).to(dtype) if summands.dim() == 3 else summands, product(x))


def check_gated(gated, expected: torch.Tensor, weight: Fp8Weight, n: int, tolerance: float) -> None:
    """It may be computed for the product that comes next."""
    values = gated if isinstance(gated, torch.Tensor) else gated.values()
    assert relative_error(values, expected) < tolerance
    down, exact = fp8_weight(48, n, weight.group, str(values.device), seed=7)  # 16 divides it
    stream = torch.zeros(len(values), 48, dtype=values.dtype, device=values.device)
    left = kernels_linear.add_matmul(stream, gated, down)
    found = Stream(stream, left).values()
    assert relative_error(found, rounded(values, weight.group).double() @ exact.T) < tolerance


def scaled_mm(x, weight, x_scale, weight_scale, *, bias, out_dtype, use_fast_accum, out=None):
    """The library's product, as far as it is promised."""
    assert x.is_contiguous() and weight.t().is_contiguous() and use_fast_accum
    assert x_scale.shape == (len(x), 1) and weight_scale.shape == (1, weight.shape[1])
    assert x_scale.is_contiguous() and weight_scale.is_contiguous()
    y = (x.double() * x_scale) @ (weight.double() * weight_scale)
    y = (y if bias is None else y + bias).to(out_dtype)
    return y if out is None else out.copy_(y)


@interpreted
@pytest.mark.parametrize("group", [None, GROUP])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_gives_the_product(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, group: int | None
) -> None:
    if kernel is Kernel.LIBRARY:
        if group is not None:
            pytest.skip("it is not chosen: see tests/kernels/test_choice.py")
        monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(kernels_linear, "_choose", lambda *_: kernel)
    rows = 2 if kernel is Kernel.GEMV else 5
    check_kernel(kernel, group, group is None, rows, 20, 300, FP32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("group", [None, GROUP])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_gives_the_product_gpu(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, group: int | None
) -> None:
    if kernel is Kernel.LIBRARY and group is not None:
        pytest.skip("it is not chosen: see tests/kernels/test_choice.py")
    monkeypatch.setattr(kernels_linear, "_choose", lambda *_: kernel)
    rows = 2 if kernel is Kernel.GEMV else 100
    check_kernel(kernel, group, True, rows, 1024, 2048, BF16, "cuda")
