"""Prefill attention over the paged cache: the kernel and its torch twin against float64."""

import pytest
import torch

from helpers.attention import GPU_SIZES, prefill
from helpers.kernel_inputs import TOLERANCE, Sizes, interpreted, on_cpu, paged_batch, relative_error
from nanovllm.kernels.prefill_attention import paged_prefill
from nanovllm.layers.paged_attention import prefill_attention

pytestmark = pytest.mark.usefixtures("poison")
# (new tokens, tokens cached before them) of each sequence, then the sizes
PREFILLS = [
    ([(1, 0), (5, 0), (16, 0), (3, 12)], (16, 2, 2, 32)),
    ([(17, 0), (1, 40), (33, 15), (20, 64)], (16, 4, 2, 64)),
    ([(48, 0), (49, 48), (1, 0), (30, 70)], (48, 4, 1, 96)),
    ([(65, 0), (130, 0), (1, 200), (70, 63)], (64, 2, 1, 64)),
    ([(10, 0), (257, 0), (3, 254), (80, 256)], (256, 2, 1, 128)),
    ([(20, 300)], (256, 8, 1, 32)),
    ([(40, 30), (3, 0)], (64, 2, 1, 256)),
]


@interpreted
@on_cpu
@pytest.mark.parametrize("function", [paged_prefill, prefill_attention])
@pytest.mark.parametrize(("rows", "sizes"), PREFILLS)
def test_paged_prefill(function, rows, sizes: Sizes, dtype: torch.dtype) -> None:
    batch = paged_batch([new for new, _ in rows], [sum(row) for row in rows], sizes, dtype)
    out = prefill(function, batch)
    assert out.dtype == dtype
    assert relative_error(out, batch.expected()) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "dtype"), GPU_SIZES)
def test_paged_prefill_gpu(sizes: Sizes, dtype: torch.dtype) -> None:
    short = [(1, 0), (2, 700), (16, 15), (1, 32767)]
    longer = [(64, 0), (33, 31), (50, 4000)]
    longest = [(128, 0), (129, 127), (1, 255), (700, 0), (1000, 1049), (1500, 500), (300, 32468)]
    for rows in (short, short + longer, short + longer + longest):
        batch = paged_batch(
            [new for new, _ in rows], [sum(row) for row in rows], sizes, dtype, "cuda"
        )
        out = prefill(paged_prefill, batch)
        assert relative_error(out, batch.expected()) < TOLERANCE[dtype]
