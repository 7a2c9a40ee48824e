"""Checks that the kernels for a few dozen and a few hundred rows must pass."""

import torch

from helpers.kernel_inputs import FP32, TOLERANCE, normal, relative_error


def check_split_k(
    function, rows: int, shape: tuple[int, int], splits, dtype, device="cpu", has_bias=True
):
    n, k = shape
    x = normal(rows, k, dtype=dtype, device=device)
    weight = normal(n, k, dtype=dtype, device=device, seed=1)
    bias = normal(n, dtype=dtype, device=device, seed=2)
    product = x.double() @ weight.double().T
    biased = [((bias,), product + bias)] if has_bias else []
    for b, expected in [((None,) * has_bias, product), *biased]:
        out = function(x, weight, *b, splits=splits)
        if splits is None:
            assert out.dtype == dtype
            into = torch.empty_like(out)
            assert function(x, weight, *b, out=into) is into
            assert torch.equal(into, out)
        else:
            assert out.dtype == FP32
            assert out.shape == (splits, rows, n)
            out = out.sum(dim=0)
        assert relative_error(out, expected) < TOLERANCE[dtype]


def check_gate(
    function, rows: int, shape: tuple[int, int], dtype, device="cpu", has_bias=True
) -> None:
    n, k = shape
    x = normal(rows, k, dtype=dtype, device=device)
    weight = normal(2 * n, k, dtype=dtype, device=device, seed=1) / k**0.5
    bias = normal(2 * n, dtype=dtype, device=device, seed=2)
    for b in ((None,), (bias,)) if has_bias else ((),):
        product = x.double() @ weight.double().T + (bias if b and b[0] is not None else 0)
        gate, up = product.chunk(2, dim=1)
        out = function(x, weight, *b, gated=True)
        assert out.dtype == dtype
        assert out.shape == (rows, n)
        assert relative_error(out, gate.sigmoid() * gate * up) < TOLERANCE[dtype]
