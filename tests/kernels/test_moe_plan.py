"""Pairs of token and expert, sorted by expert on the device."""

import random

import pytest
import torch

from helpers.experts import ROUTINGS, random_experts
from helpers.kernel_inputs import interpreted
from nanovllm.kernels.moe_plan import max_tiles, plan_experts

pytestmark = pytest.mark.usefixtures("poison")


def check_plan(experts: torch.Tensor, num_experts: int) -> None:
    plan = plan_experts(experts.int(), num_experts)
    flat = experts.flatten().tolist()
    assert plan.pairs.tolist() == sorted(range(len(flat)), key=lambda pair: flat[pair])
    starts = [sum(other < expert for other in flat) for expert in range(num_experts + 1)]
    assert plan.offsets.tolist() == starts


@interpreted
@pytest.mark.parametrize("experts", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_plan(experts: torch.Tensor) -> None:
    check_plan(experts, 5)


@interpreted
def test_plan_of_thousands_of_tokens() -> None:
    """More pairs than a program reads at once."""
    check_plan(random_experts(3001, 2, 7), 7)
    check_plan(torch.full((2500, 2), 1), 3)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 9, 512, 16384])
def test_plan_gpu(tokens: int) -> None:
    check_plan(random_experts(tokens, 8, 128).cuda(), 128)
    check_plan(torch.full((tokens, 8), 77, device="cuda"), 128)


def test_no_routing_has_more_tiles() -> None:
    source = random.Random(0)
    for _ in range(2000):
        num_experts, num_pairs = source.randint(1, 9), source.randint(1, 60)
        rows, spread = source.choice([1, 2, 16]), source.randint(1, num_experts)
        experts = [source.randrange(spread) for _ in range(num_pairs)]
        tiles = sum(-(-experts.count(expert) // rows) for expert in range(num_experts))
        assert tiles <= max_tiles(num_pairs, num_experts, rows)


@pytest.mark.parametrize(("num_pairs", "num_experts"), [(1, 5), (5, 5), (6, 5), (37, 5), (53, 3)])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_some_routing_has_as_many(num_pairs: int, num_experts: int, rows: int) -> None:
    hit = min(num_pairs, num_experts)
    counts = [1] * (hit - 1) + [num_pairs - hit + 1]
    assert sum(-(-count // rows) for count in counts) == max_tiles(num_pairs, num_experts, rows)
