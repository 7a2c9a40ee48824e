"""A step's experts by whichever kernels serve it, beside plain torch."""

from pathlib import Path

import pytest
import torch

from helpers.compile_launches import run_compiler
from helpers.experts import make_case, random_experts
from helpers.kernel_inputs import (
    FP16,
    FP32,
    TOLERANCE,
    interpreted,
    normal,
    on_gpu,
    relative_error,
)
from nanovllm.kernels.expert_gemv import MAX_TOKENS
from nanovllm.kernels.experts import apply_experts
from nanovllm.layers.moe import Experts, Routing, SparseMoE

pytestmark = pytest.mark.usefixtures("poison")


def check_experts(
    experts: torch.Tensor, num_experts: int, hidden: int, inner: int, dtype, device: str = "cpu"
) -> None:
    """And the layer's formula in torch, where there is one without kernels."""
    case = make_case(experts, num_experts, hidden, inner, dtype, device)
    expected = case.expected()
    y = apply_experts(*case)
    assert y.dtype == dtype
    assert relative_error(y, expected) < 2 * TOLERANCE[dtype]
    assert torch.equal(apply_experts(*case), y)  # repeatable
    stream = normal(len(experts), hidden, dtype=dtype, device=device, seed=7)
    total = stream.double() + expected
    assert apply_experts(*case, stream) is stream
    assert relative_error(stream, total) < 2 * TOLERANCE[dtype]
    if device == "cpu":
        twin = Experts(hidden, inner, num_experts, "silu").requires_grad_(False)
        twin.gate_up_proj, twin.down_proj = map(torch.nn.Parameter, (case.gate_up, case.down))
        plain = twin(case.x, Routing(case.experts.long(), case.weights))
        assert relative_error(y, plain) < 2 * TOLERANCE[dtype]


@interpreted
@pytest.mark.parametrize("tokens", [1, MAX_TOKENS, MAX_TOKENS + 1])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_experts(tokens: int, dtype: torch.dtype) -> None:
    check_experts(random_experts(tokens, 2, 5), 5, 40, 24, dtype)


@interpreted
def test_no_token_is_nothing() -> None:
    case = make_case(torch.empty(0, 2, dtype=torch.int64), 5, 8, 4, FP32)
    assert apply_experts(*case).shape == (0, 8)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("tokens", [1, MAX_TOKENS, MAX_TOKENS + 1, 300, 2000])
def test_experts_gpu(tokens: int, dtype: torch.dtype) -> None:
    check_experts(random_experts(tokens, 4, 16), 16, 512, 192, dtype, "cuda")


@pytest.mark.gpu
def test_a_graph_holds_any_routing_gpu() -> None:
    """Captured with all pairs in one expert, replayed with others."""
    case = make_case(random_experts(64, 4, 16), 16, 256, 128, FP16, "cuda")
    expected, wanted = case.expected(), case.experts.clone()
    case.experts.fill_(int(wanted[0, 0]))
    apply_experts(*case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = apply_experts(*case)
    case.experts.copy_(wanted)
    graph.replay()
    assert relative_error(y, expected) < 2 * TOLERANCE[FP16]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("tokens", [1, MAX_TOKENS + 1, 200])
def test_the_layer_gpu(tokens: int, dtype: torch.dtype) -> None:
    """Router and experts, beside the same layer on a CPU in float32."""
    network = SparseMoE(256, 96, 16, 4, renormalize=True)
    for seed, parameter in enumerate(network.requires_grad_(False).parameters()):
        parameter.copy_(normal(*parameter.shape, dtype=dtype, seed=seed).float() / 16)
    x = normal(tokens, 256, dtype=dtype, seed=9)
    network.to(dtype)
    routing = network.to("cuda").route(x.cuda())
    y = network.experts(x.cuda(), routing).cpu()
    network.to("cpu", FP32)
    expected = network.experts(x.float(), Routing(routing.experts.cpu(), routing.weights.cpu()))
    assert relative_error(y, expected) < 2 * TOLERANCE[dtype]
    gates = network.gate.weight.double() @ x.double().T
    kept = gates.softmax(0).T.gather(1, routing.experts.cpu().long()).sum(dim=1)
    best = gates.softmax(0).T.topk(4).values.sum(dim=1)
    assert (kept > best * (1 - 2e-2)).all()


def test_only_kernels_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Experts(4, 2, 3, "silu").can_capture
    assert not Experts(4, 2, 3, "gelu").can_capture
    monkeypatch.setattr("nanovllm.layers.moe.kernels", None)
    assert not Experts(4, 2, 3, "silu").can_capture


LARGEST_TILES = """
import torch
from helpers.compile_launches import RTX_4090, launches
from nanovllm.kernels.grouped_gemm import grouped_gate_up
from nanovllm.kernels.moe_plan import MoePlan

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

plan = MoePlan(*(empty(n, dtype=torch.int32) for n in (32768, 129)))
[launch] = launches(
    grouped_gate_up, empty(4096, 2048), empty(128, 1536, 2048), plan, 8, card=RTX_4090
)
print(launch.grid, launch.fits, launch.spills)
"""


def test_the_largest_tiles_fit(tmp_path: Path) -> None:
    assert run_compiler(LARGEST_TILES, tmp_path) == "(12, 383) True 0\n"
