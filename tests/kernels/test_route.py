"""The router: softmax, top-k, weights."""

import pytest
import torch

from helpers.kernel_inputs import BF16, FP16, FP32, interpreted, normal, on_cpu, relative_error
from nanovllm.kernels.route import route

pytestmark = pytest.mark.usefixtures("poison")

SHAPES = [(1, 1, 1), (3, 128, 8), (5, 60, 3), (2, 6, 6), (20, 16, 4)]


def check_route(tokens: int, num_experts: int, top_k: int, dtype, device: str = "cpu") -> None:
    logits = 3 * normal(tokens, num_experts, dtype=dtype, device=device)
    p = logits.double().softmax(1)
    for renormalize in (False, True):
        experts, weights = route(logits, top_k, renormalize)
        assert (experts.dtype, weights.dtype) == (torch.int32, FP32)
        for row, own in zip(p, experts.long()):
            order = sorted(range(num_experts), key=lambda e: (-row[e].float(), e))
            assert own.tolist() == order[:top_k]
        expected = p.gather(1, experts.long())
        if renormalize:
            expected = expected / expected.sum(dim=1, keepdim=True)
        assert relative_error(weights, expected) < 1e-5


@interpreted
@on_cpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_route(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_route(*shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 128, 8)], ids=str)
def test_route_gpu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_route(*shape, dtype, "cuda")


@pytest.mark.gpu
def test_ties_are_decided_as_by_torch_gpu() -> None:
    logits = normal(500, 128, dtype=FP32, device="cuda").round()
    experts, _ = route(logits, 8, renormalize=True)
    theirs = logits.softmax(1).topk(8).indices
    assert torch.equal(experts.sort(dim=1).values, theirs.int().sort(dim=1).values)


@interpreted
def test_of_equal_ones_the_first_is_taken() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 1.0], [0.0] * 6])
    experts, _ = route(logits, 4, renormalize=False)
    assert experts.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_leads_to_no_other_expert(value: float) -> None:
    logits = torch.full((2, 5), value)
    logits[1] = torch.arange(5.0)
    experts, weights = route(logits, 3, renormalize=True)
    assert ((experts >= 0) & (experts < 5)).all()
    assert experts[1].tolist() == [4, 3, 2] and weights[1].sum().item() == pytest.approx(1)
