"""Gate and up of the MLP in one product, for the tokens of prompts."""

from pathlib import Path

import pytest
import torch

from helpers.compile_launches import run_compiler
from helpers.kernel_inputs import BF16, FP16, interpreted
from helpers.products import check_gate
from nanovllm.kernels import gated_gemm as gated_gemm_module
from nanovllm.kernels.gated_gemm import gated_gemm

pytestmark = pytest.mark.usefixtures("poison")


def always_gated(x: torch.Tensor, weight: torch.Tensor, gated: bool) -> torch.Tensor:
    assert gated
    return gated_gemm(x, weight)


@interpreted
@pytest.mark.parametrize(
    ("rows", "shape"),
    [(1, (8, 8)), (127, (136, 104)), (128, (128, 64)), (300, (264, 72)), (1100, (136, 8))],
)
@pytest.mark.parametrize("programs", [1, 4])
def test_gated_gemm(
    monkeypatch: pytest.MonkeyPatch, rows: int, shape: tuple[int, int], programs: int
) -> None:
    """Fewer tiles than programs, and several a program; more tiles of rows than a group has."""
    monkeypatch.setattr(gated_gemm_module, "_PROGRAMS_WITHOUT_GPU", programs)
    check_gate(always_gated, rows, shape, FP16, has_bias=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        (1, (3072, 1024)), (2048, (3072, 1024)), (16383, (3072, 1024)), (3000, (4864, 896)),
        (2050, (12288, 4096)), (5000, (1000, 1000)), (130, (8, 8)),
    ],
)  # fmt: skip
def test_gated_gemm_gpu(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_gate(always_gated, rows, shape, dtype, "cuda", has_bias=False)


COMPILED = """
import torch
from helpers.compile_launches import B200, H100, launches
from nanovllm.kernels.gated_gemm import gated_gemm

def empty(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")

for card in (H100, B200):
    found = [
        launches(gated_gemm, empty(rows, 1024), empty(6144, 1024), card=card)[0]
        for rows in (16384, 129)
    ]
    print(card.name, *(launch.grid[0] for launch in found), found[0].fits, found[0].spills)
    assert found[0].compiled.hash == found[1].compiled.hash
    ptx = found[0].compiled.asm["ptx"]
    assert "griddepcontrol.wait" in ptx
    assert card is B200 or "m64n256k16" in ptx
"""


@pytest.mark.slow
@interpreted
def test_it_compiles_once_for_all_prompts_and_without_spills(tmp_path: Path) -> None:
    """Gate and up are one operand of 256 columns."""
    assert run_compiler(COMPILED, tmp_path) == "H100 132 48 True 0\nB200 148 48 True 0\n"
