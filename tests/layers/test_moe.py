"""A mixture of experts, in plain torch."""

import pytest
import torch
import torch.nn.functional as F

from helpers.kernel_inputs import normal, relative_error
from nanovllm.layers.deferred import Stream
from nanovllm.layers.moe import Experts, SparseMoE, route

FP32 = torch.float32


def moe(
    hidden: int, inner: int, experts: int, top_k: int, renormalize: bool = True, shared: int = 0
) -> SparseMoE:
    network = SparseMoE(hidden, inner, experts, top_k, renormalize=renormalize, shared_size=shared)
    for seed, parameter in enumerate(network.requires_grad_(False).parameters()):
        parameter.copy_(normal(*parameter.shape, dtype=FP32, seed=seed))
    return network


def token_float64(network: SparseMoE, x: torch.Tensor) -> torch.Tensor:
    """The output for one token, [hidden] float64."""
    p = (network.gate.weight.double() @ x.double()).softmax(0)
    best = sorted(range(len(p)), key=lambda expert: -p[expert])[: network.top_k]
    total = sum(p[expert] for expert in best) if network.renormalize else 1
    y = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for expert in best:
        gate, up = (network.experts.gate_up_proj[expert].double() @ x.double()).chunk(2)
        inner = gate * gate.sigmoid() * up
        y += p[expert] / total * (network.experts.down_proj[expert].double() @ inner)
    return y + shared_float64(network, x)


def shared_float64(network: SparseMoE, x: torch.Tensor) -> torch.Tensor:
    """What the shared expert adds for one token, [hidden] float64."""
    if (mlp := network.shared_expert) is None:
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)
    gate, up = (mlp.gate_up_proj.weight.double() @ x.double()).chunk(2)
    factor = (network.shared_expert_gate.weight.double() @ x.double()).sigmoid()
    return factor * (mlp.down_proj.weight.double() @ (gate * gate.sigmoid() * up))


@pytest.mark.parametrize("shared", [0, 14])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (5, 1), (5, 3), (16, 16)])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_it_is_the_formula(tokens: int, experts: int, top_k: int, renormalize: bool, shared: int):
    network = moe(24, 10, experts, top_k, renormalize, shared)
    x = normal(tokens, 24, dtype=FP32, seed=9)
    expected = torch.stack([token_float64(network, row) for row in x])
    assert relative_error(network(x).values(), expected) < 1e-5
    out = torch.full_like(x, float("nan"))
    assert network(x).values(out) is out
    assert relative_error(out, expected) < 1e-5
    total = (Stream(x.clone()) + network(x)).values()
    assert relative_error(total, x.double() + expected) < 1e-5


def test_partial_sums_of_the_shared_expert_are_added_once(monkeypatch: pytest.MonkeyPatch):
    """As they come from a kernel that cuts the inner features in two."""
    network, x = moe(24, 10, 5, 2, shared=14), normal(6, 24, dtype=FP32, seed=9)
    down = network.shared_expert.down_proj

    def multiply_add(inner: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        pieces = zip(inner.split([5, 9], dim=1), down.weight.split([5, 9], dim=1), strict=True)
        return torch.stack([F.linear(part, weight) for part, weight in pieces])

    monkeypatch.setattr(down, "multiply_add", multiply_add)
    total = Stream(x.clone()) + network(x)
    assert total.partials.shape == (2, 6, 24), "for the norm that comes next"
    expected = torch.stack([row + token_float64(network, row) for row in x])
    assert relative_error(total.values(), expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 8, 33, 64, 128, 129, 200, 300])
def test_with_a_shared_expert_gpu(tokens: int):
    """In bf16, by all kernels that products of so many rows go to. All experts are chosen."""
    network = moe(256, 128, 4, 4, renormalize=False, shared=384).to("cuda", torch.bfloat16)
    for parameter in network.parameters():
        parameter.div_(parameter.shape[-1] ** 0.5)
    x = normal(tokens, 256, dtype=torch.bfloat16, device="cuda", seed=9)
    expected = torch.stack([token_float64(network, row) for row in x])
    assert relative_error(network(x).values(), expected) < 2e-2
    total = (Stream(x.clone()) + network(x)).values()
    assert relative_error(total, x.double() + expected) < 2e-2


def test_no_token_is_nothing():
    assert moe(8, 4, 3, 2, shared=4)(torch.empty(0, 8)).values().shape == (0, 8)


def test_a_token_does_not_depend_on_its_company():
    """To the last bit: of one feature, no product has an order but that of the experts."""
    network, x = moe(1, 1, 12, 5), normal(50, 1, dtype=FP32, seed=3) * 4
    together = network(x).values()
    for order in (torch.arange(50).flip(0), torch.arange(0, 50, 7), torch.tensor([31])):
        assert torch.equal(network(x[order]).values(), together[order])


def test_the_router_computes_in_float32():
    logits = normal(40, 16, dtype=torch.bfloat16)
    experts, weights = route(logits, 4, renormalize=False)
    assert weights.dtype == FP32
    probabilities = logits.double().softmax(1)
    assert relative_error(weights, probabilities.gather(1, experts)) < 1e-6
    assert torch.equal(experts, logits.float().softmax(1).topk(4).indices)


def test_outputs_are_added_up_in_float32():
    """256 experts of equal weight, each adding 1/256 of a third, in bf16."""
    experts = Experts(1, 1, 256, "silu").to(torch.bfloat16).requires_grad_(False)
    experts.gate_up_proj.fill_(1.0)
    experts.down_proj.fill_(1.0)
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    routing = route(torch.zeros(1, 256), 256, renormalize=True)
    y = experts(x, routing)
    assert y.dtype == torch.bfloat16
    assert y.item() == pytest.approx(F.silu(torch.ones(())).item(), rel=2**-8)
