"""Products of many tokens with the matrices of their experts."""

import pytest
import torch

from helpers.experts import ROUTINGS, make_case, random_experts
from helpers.kernel_inputs import (
    FP16,
    FP32,
    TOLERANCE,
    interpreted,
    normal,
    on_cpu,
    on_gpu,
    relative_error,
)
from nanovllm.kernels.grouped_gemm import grouped_down, grouped_gate_up, tiling, weighted_sum
from nanovllm.kernels.moe_plan import plan_experts

pytestmark = pytest.mark.usefixtures("poison")


def check_grouped(
    experts: torch.Tensor, num_experts: int, hidden: int, inner: int, dtype, device: str = "cpu"
) -> None:
    case = make_case(experts, num_experts, hidden, inner, dtype, device)
    plan = plan_experts(case.experts, num_experts)
    h = grouped_gate_up(case.x, case.gate_up, plan, experts.shape[1])
    assert h.dtype == dtype
    assert relative_error(h, case.inner()[plan.pairs.long()]) < TOLERANCE[dtype]
    y = grouped_down(h, case.down, plan)
    assert y.dtype == dtype
    in_order = torch.empty_like(h)
    in_order[plan.pairs.long()] = h
    assert relative_error(y, case.outputs(in_order)) < TOLERANCE[dtype]


@interpreted
@on_cpu
@pytest.mark.parametrize("experts", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_grouped_products(experts: torch.Tensor, dtype: torch.dtype) -> None:
    check_grouped(experts, 5, 72, 40, dtype)


@interpreted
@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (130, 33), (128, 128)])
def test_grouped_products_of_all_sizes(hidden: int, inner: int) -> None:
    check_grouped(random_experts(20, 2, 3), 3, hidden, inner, FP16)


@interpreted
def test_grouped_products_of_thousands_of_tokens() -> None:
    check_grouped(random_experts(2050, 2, 4), 4, 16, 24, FP16)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("tokens", [1, 9, 64, 300, 1500])
def test_grouped_products_gpu(tokens: int, dtype: torch.dtype) -> None:
    check_grouped(random_experts(tokens, 4, 16), 16, 1024, 384, dtype, "cuda")
    check_grouped(torch.full((tokens, 1), 3), 5, 200, 72, dtype, "cuda")


@interpreted
@on_cpu
@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(1, 1, 1), (3, 8, 1030), (5, 3, 2048)])
def test_weighted_sum(tokens: int, top_k: int, hidden: int, dtype: torch.dtype) -> None:
    y = normal(tokens * top_k, hidden, dtype=dtype)
    weights = normal(tokens, top_k, dtype=FP32, seed=1)
    total = (y.double().view(tokens, top_k, hidden) * weights.double()[:, :, None]).sum(dim=1)
    out = weighted_sum(y, weights)
    assert out.dtype == dtype
    assert relative_error(out, total) < TOLERANCE[dtype]
    stream = normal(tokens, hidden, dtype=dtype, seed=2)
    expected = stream.double() + total
    assert weighted_sum(y, weights, stream) is stream
    assert relative_error(stream, expected) < TOLERANCE[dtype]


def test_tiles_are_as_high_as_an_expert_has_pairs() -> None:
    heights = [tiling(tokens * 8, 128, 2).rows for tokens in (1, 256, 512, 1024, 16384)]
    assert heights == [16, 16, 32, 64, 128]
    for tokens in (9, 600, 5000):
        for size in (2, 4):
            tile = tiling(tokens * 8, 128, size)
            stage = (tile.rows + tile.outputs) * tile.block_k * size
            assert stage * tile.num_stages <= 99 * 1024
