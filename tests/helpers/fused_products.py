"""A product with what comes before and after it, in every form that one kernel makes."""

from collections.abc import Callable

import torch

from helpers.kernel_inputs import EPS, TOLERANCE, normal, relative_error, rms_norm_float64


def check_fused_products(
    function: Callable[..., torch.Tensor],
    rows: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: str = "cpu",
) -> None:
    """At one size: plain, with bias, norm, gate and residual.

    Args:
        function: with the arguments of `kernels.gemv.gemv`.
        shape: [out, in].
    """
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

    check(product, function(x, weight[:n]))
    check(product + bias, function(x, weight[:n], bias))
    check(normed_product, function(x, weight[:n], **norm))
    check(normed_product + bias, function(x, weight[:n], bias, **norm))
    check(product.sigmoid() * product * up, function(x, weight, gated=True))
    gate = normed_product.sigmoid() * normed_product
    check(gate * normed_up, function(x, weight, gated=True, **norm))
    gate = (normed_product + bias).sigmoid() * (normed_product + bias)
    biases = torch.cat((bias, up_bias))
    check(gate * (normed_up + up_bias), function(x, weight, biases, gated=True, **norm))
    out = torch.empty_like(residual)
    assert function(x, weight[:n], bias, out=out) is out
    check(product + bias, out)
    total = residual.double() + product
    y = residual.clone()
    assert function(x, weight[:n], add_to=y) is y
    check(total, y)
    y = residual.clone()
    function(x, weight[:n], bias, add_to=y)
    check(total + bias, y)
