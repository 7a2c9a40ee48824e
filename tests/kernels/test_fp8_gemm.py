"""Weights in fp8 times any number of rows in fp8."""

from pathlib import Path

import pytest
import torch

from helpers.compile_launches import run_compiler
from helpers.fp8 import GROUP, fp8_weight, rounded
from helpers.kernel_inputs import BF16, FP16, FP32, TOLERANCE, interpreted, normal, relative_error
from nanovllm.kernels import fp8_gemm as fp8_gemm_module
from nanovllm.kernels.fp8_gemm import fp8_gemm
from nanovllm.kernels.fp8_rows import quantize_rows

pytestmark = pytest.mark.usefixtures("poison")


def check_gemm(rows: int, shape: tuple[int, int], dtype, device: str = "cpu") -> None:
    n, k = shape
    x = normal(rows, k, dtype=dtype, device=device)
    x[0], x[-1, k // 2] = 0, 1000
    bias = normal(n, dtype=dtype, device=device, seed=2)
    for group in (None, GROUP):
        weight, exact = fp8_weight(n, k, group, device)
        values, scale = quantize_rows(x, weight.group)
        expected = rounded(x, group).double() @ exact.T
        for b in (None, bias):
            out = torch.empty(rows, n, dtype=dtype, device=device)
            y = fp8_gemm(values, weight.values, (scale, weight.scale), dtype, b, out)
            assert y is out
            assert relative_error(y, expected if b is None else expected + b) < TOLERANCE[dtype]


@interpreted
@pytest.mark.parametrize(
    ("rows", "shape", "dtype"),
    [(5, (70, 300), FP32), (40, (3, 256), FP16), (140, (130, 64), FP32)],
)
def test_gemm(
    monkeypatch: pytest.MonkeyPatch, rows: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Also more tiles of rows than run before the next tile of outputs."""
    monkeypatch.setattr(fp8_gemm_module, "_MOST_ROWS", 32)
    check_gemm(rows, shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "shape", "dtype"),
    [
        (3, (1024, 3072), BF16), (129, (4096, 1024), BF16), (2000, (2560, 9728), BF16),
        (300, (1000, 1000), FP16), (64, (4096, 1024), FP32),
    ],
)  # fmt: skip
def test_gemm_gpu(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_gemm(rows, shape, dtype, "cuda")


COMPILED = """
import re

import torch
from helpers.compile_launches import RTX_4090, H100, launches
from nanovllm.kernels.experts import apply_experts
from nanovllm.kernels.fp8_linear import fp8_product
from nanovllm.quantization.fp8 import GROUP, Fp8Weight

def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")

def multiply(x, weight, by_split_k):
    fp8_product(x, weight, None, by_split_k=by_split_k, by_library=False)

for dtype in (torch.float32, torch.bfloat16):
    for card in (H100, RTX_4090):
        x = empty(128, 1024, dtype=dtype)
        weight = Fp8Weight(*Fp8Weight.parameters_like(empty(4096, 1024, dtype=dtype), GROUP))
        compiled = launches(multiply, x, weight, False, card=card)[1:]
        if card is H100:
            compiled += launches(multiply, x, weight, True, card=card)[1:]
        stacks = [empty(2, 512, 256, dtype=dtype), empty(2, 256, 256, dtype=dtype)]
        stacks = [Fp8Weight(*Fp8Weight.parameters_like(each, GROUP)) for each in stacks]
        given = [empty(128, 2, dtype=each) for each in (torch.int32, torch.float32)]
        given = empty(128, 256, dtype=dtype), *given, *stacks
        compiled += launches(apply_experts, *given, card=card)
        for launch in compiled:
            products = re.findall(r"mma[_a-z]*\\.sync\\.\\S+", launch.compiled.asm["ptx"])
            if products:
                in_fp8 = {"e4m3" in product for product in products}
                print(dtype == torch.float32, launch.name, in_fp8, launch.fits, launch.spills)
"""


@pytest.mark.slow
def test_results_in_float32_are_products_of_float16(tmp_path: Path) -> None:
    """All others are of fp8."""
    names = ["_fp8_gemm_kernel", "_split_k_kernel", "_grouped_gemm_kernel", "_grouped_gemm_kernel"]
    names += [names[0], *names[2:]]  # there is no split K on the other card
    lines = run_compiler(COMPILED, tmp_path).splitlines()
    expected = [
        f"{is_exact} {name} { ({not is_exact}) } True 0"
        for is_exact in (True, False)
        for name in names
    ]
    assert lines == expected
