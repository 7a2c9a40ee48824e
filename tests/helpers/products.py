"""Checks that both kernels of matrix products must pass."""

from helpers.kernel_inputs import FP32, TOLERANCE, normal, relative_error


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


def check_gate(function, rows: int, shape: tuple[int, int], dtype, device="cpu") -> None:
    n, k = shape
    x = normal(rows, k, dtype=dtype, device=device)
    weight = normal(2 * n, k, dtype=dtype, device=device, seed=1) / k**0.5
    gate, up = (x.double() @ part.double().T for part in weight.chunk(2))
    out = function(x, weight, gated=True)
    assert out.dtype == dtype
    assert out.shape == (rows, n)
    assert relative_error(out, gate.sigmoid() * gate * up) < TOLERANCE[dtype]
