"""The experts of a few tokens."""

import pytest
import torch

from helpers.experts import make_case, random_experts
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
from nanovllm.kernels.expert_gemv import MAX_TOKENS, expert_down, expert_gate_up

pytestmark = pytest.mark.usefixtures("poison")


def check_gemv(
    experts: torch.Tensor, num_experts: int, hidden: int, inner: int, dtype, device: str = "cpu"
) -> None:
    case = make_case(experts, num_experts, hidden, inner, dtype, device)
    h = expert_gate_up(case.x, case.gate_up, case.experts)
    assert h.dtype == dtype
    assert relative_error(h, case.inner()) < TOLERANCE[dtype]
    y = expert_down(h, case.down, case.experts, case.weights)
    assert y.dtype == dtype
    expected = case.outputs(h).view(*experts.shape, hidden)
    expected = (expected * case.weights.double()[:, :, None]).sum(dim=1)
    assert relative_error(y, expected) < TOLERANCE[dtype]
    stream = normal(len(experts), hidden, dtype=dtype, device=device, seed=5)
    expected = stream.double() + expected
    assert expert_down(h, case.down, case.experts, case.weights, stream) is stream
    assert relative_error(stream, expected) < TOLERANCE[dtype]


@interpreted
@on_cpu
@pytest.mark.parametrize(
    "experts",
    [random_experts(1, 3, 5), random_experts(MAX_TOKENS, 2, 5), torch.full((4, 1), 4)],
    ids=["one token", "some", "one expert"],
)
def test_expert_gemv(experts: torch.Tensor, dtype: torch.dtype) -> None:
    check_gemv(experts, 5, 40, 24, dtype)


@interpreted
@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (520, 30), (30, 260)])
def test_expert_gemv_of_all_sizes(hidden: int, inner: int) -> None:
    check_gemv(random_experts(2, 2, 3), 3, hidden, inner, FP16)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("tokens", [1, 3, MAX_TOKENS])
@pytest.mark.parametrize(("hidden", "inner"), [(2048, 768), (1000, 200)])
def test_expert_gemv_gpu(tokens: int, hidden: int, inner: int, dtype: torch.dtype) -> None:
    check_gemv(random_experts(tokens, 8, 16), 16, hidden, inner, dtype, "cuda")


@interpreted
def test_a_token_does_not_depend_on_the_others() -> None:
    case = make_case(random_experts(4, 3, 6), 6, 50, 20, FP32)
    h = expert_gate_up(case.x, case.gate_up, case.experts)
    together = expert_down(h, case.down, case.experts, case.weights)
    for token in range(4):
        own = slice(token, token + 1)
        h = expert_gate_up(case.x[own], case.gate_up, case.experts[own])
        alone = expert_down(h, case.down, case.experts[own], case.weights[own])
        assert torch.equal(alone[0], together[token])
