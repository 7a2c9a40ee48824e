"""Experts with weights in fp8, by every kernel that serves them."""

from pathlib import Path

import pytest
import torch

from helpers.compile_launches import run_compiler
from helpers.experts import ROUTINGS, Fp8Case, make_fp8_case, random_experts
from helpers.fp8 import GROUP
from helpers.kernel_inputs import (
    BF16,
    FP16,
    FP32,
    TOLERANCE,
    interpreted,
    normal,
    relative_error,
)
from nanovllm.kernels import fp8_expert_gemv
from nanovllm.kernels.choice import Kernel
from nanovllm.kernels.expert_gemv import MAX_TOKENS
from nanovllm.kernels.experts import apply_experts
from nanovllm.kernels.fp8_expert_gemv import fp8_expert_down, fp8_expert_gate_up
from nanovllm.kernels.fp8_rows import quantize_rows
from nanovllm.kernels.grouped_gemm import grouped_down, grouped_gate_up, tiling, weighted_sum
from nanovllm.kernels.moe_plan import plan_experts
from nanovllm.layers.deferred import Stream
from nanovllm.layers.moe import Experts, Routing, SparseMoE
from nanovllm.quantization.fp8 import Fp8Weight
from nanovllm.quantization.fp8_checkpoints import Fp8Blocks
from nanovllm.quantization.fp8_weights import use_fp8

pytestmark = pytest.mark.usefixtures("poison")
GROUPS = pytest.mark.parametrize("group", [None, GROUP])


@pytest.fixture
def many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a program of a GEMV: the interpreter takes its time for each program."""
    monkeypatch.setattr(fp8_expert_gemv, "_ROWS", 64)


def check_gemv(case: Fp8Case) -> torch.Tensor:
    """Each of the two products, by what came to it: the second one's input is what the first has
    made, as a number of it on the border between two of e4m3 may go to either. Returns the sum."""
    dtype, (_, experts, weights, gate_up, down, exact) = case.x.dtype, case
    h = fp8_expert_gate_up(*quantize_rows(case.x, gate_up.group), gate_up, experts, dtype)
    assert h.dtype == dtype
    assert relative_error(h, exact.inner()) < TOLERANCE[dtype]
    expected, rows = case.sums(h), quantize_rows(h, down.group)
    y = fp8_expert_down(*rows, down, experts, weights, torch.empty_like(case.x), False)
    assert relative_error(y, expected) < TOLERANCE[dtype]
    stream = normal(*case.x.shape, dtype=dtype, device=str(case.x.device), seed=5)
    expected = stream.double() + expected
    assert fp8_expert_down(*rows, down, experts, weights, stream, True) is stream
    assert relative_error(stream, expected) < TOLERANCE[dtype]
    return y


def check_grouped(case: Fp8Case) -> torch.Tensor:
    """The same of the other two kernels."""
    dtype, (_, experts, weights, gate_up, down, exact) = case.x.dtype, case
    plan = plan_experts(experts, len(gate_up.values))
    values, scale = quantize_rows(case.x, gate_up.group)
    scales = scale, gate_up.scale
    h = grouped_gate_up(values, gate_up.values, plan, experts.shape[1], scales, dtype)
    assert h.dtype == dtype
    assert relative_error(h, exact.inner()[plan.pairs.long()]) < TOLERANCE[dtype]
    in_order = torch.empty_like(h)
    in_order[plan.pairs.long()] = h
    values, scale = quantize_rows(h, down.group)
    y = grouped_down(values, down.values, plan, (scale, down.scale), dtype)
    assert y.dtype == dtype
    y = weighted_sum(y, weights)
    assert relative_error(y, case.sums(in_order)) < 2 * TOLERANCE[dtype]
    return y


def check_experts(case: Fp8Case) -> torch.Tensor:
    """All together: to the last bit what their kernels give one by one."""
    *given, _ = case
    is_gemv = len(case.x) <= MAX_TOKENS
    y = check_gemv(case) if is_gemv else check_grouped(case)
    for _ in range(2):  # repeatable
        assert torch.equal(apply_experts(*given), y)
    stream = normal(*case.x.shape, dtype=case.x.dtype, device=str(case.x.device), seed=7)
    total = stream.double() + y.double()
    assert apply_experts(*given, stream) is stream
    assert relative_error(stream, total) < TOLERANCE[case.x.dtype]
    return y


@interpreted
@pytest.mark.parametrize(
    ("experts", "group"),
    [
        (random_experts(1, 3, 5), GROUP),
        (random_experts(3, 2, 5), None),
        (torch.full((2, 1), 4), GROUP),
    ],
    ids=["one token", "some", "one expert"],
)
@pytest.mark.usefixtures("many_rows")
def test_gemv(experts: torch.Tensor, group: int | None) -> None:
    check_gemv(make_fp8_case(experts, 5, 136, 130, FP32, group))


@interpreted
@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (600, 3), (3, 260)])
@pytest.mark.usefixtures("many_rows")
def test_gemv_of_all_sizes(hidden: int, inner: int) -> None:
    check_gemv(make_fp8_case(random_experts(2, 2, 3), 3, hidden, inner, FP16, GROUP))


@interpreted
@pytest.mark.parametrize("routing", ["one token", "all to one expert", "one expert has one token"])
def test_grouped_products(routing: str) -> None:
    check_grouped(make_fp8_case(ROUTINGS[routing], 5, 150, 136, FP32, GROUP))


@interpreted
def test_grouped_products_without_groups() -> None:
    check_grouped(make_fp8_case(random_experts(20, 2, 3), 3, 40, 136, FP32, None))


@interpreted
@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (33, 260)])
def test_grouped_products_of_all_sizes(hidden: int, inner: int) -> None:
    check_grouped(make_fp8_case(random_experts(20, 2, 3), 3, hidden, inner, FP16, GROUP))


@interpreted
@pytest.mark.parametrize(("tokens", "group"), [(2, None), (2, GROUP), (MAX_TOKENS + 1, GROUP)])
@pytest.mark.usefixtures("many_rows")
def test_experts(tokens: int, group: int | None) -> None:
    """And the layer's formula in torch."""
    case = make_fp8_case(random_experts(tokens, 2, 5), 5, 40, 136, FP32, group)
    y = check_experts(case)
    twin = Experts(40, 136, 5, "silu")
    for name in ("gate_up", "down"):
        for end, tensor in zip(("_proj", "_scale"), getattr(case, name)):
            setattr(twin, name + end, torch.nn.Parameter(tensor, requires_grad=False))
    plain = twin(case.x, Routing(case.experts.long(), case.weights))
    assert relative_error(y, plain) < 2e-2


@interpreted
@pytest.mark.usefixtures("many_rows")
def test_a_token_does_not_depend_on_the_others() -> None:
    x, experts, weights, *factors, _ = make_fp8_case(
        random_experts(3, 2, 6), 6, 130, 20, FP32, GROUP
    )
    together = apply_experts(x, experts, weights, *factors)
    for token in range(3):
        own = slice(token, token + 1)
        alone = apply_experts(x[own], experts[own], weights[own], *factors)
        assert torch.equal(alone[0], together[token])


@interpreted
@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize("blocks", [None, Fp8Blocks()], ids=["whole", "groups"])
def test_the_layer_with_a_shared_expert(
    monkeypatch: pytest.MonkeyPatch, blocks: Fp8Blocks | None
) -> None:
    """Whose gate may come as what is still to be computed."""
    layer = torch.nn.Module()
    layer.mlp = mlp = SparseMoE(136, 24, 4, 2, renormalize=False, shared_size=40)
    use_fp8(layer, blocks)
    for seed, parameter in enumerate(mlp.requires_grad_(False).parameters()):
        numbers = normal(*parameter.shape, dtype=FP32, seed=seed) / 8
        parameter.copy_(numbers.abs() / 8 if parameter.shape[-1] <= 2 else numbers)
    assert mlp.experts.can_capture
    x = normal(3, 136, dtype=FP32, seed=9)
    expected = mlp(x).values()
    for module in ("moe", "linear"):
        monkeypatch.setattr(f"nanovllm.layers.{module}.has_kernels", lambda _: True)
    monkeypatch.setattr(
        "nanovllm.kernels.linear._choose",
        lambda _, weight, *__: Kernel.FP8_GEMM if isinstance(weight, Fp8Weight) else Kernel.LIBRARY,
    )
    assert relative_error(mlp(x).values(), expected) < 2e-2
    total = (Stream(x.clone()) + mlp(x)).values()
    assert relative_error(total, x + expected) < 2e-2


@pytest.mark.gpu
@GROUPS
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [
        (1, BF16), (3, FP32), (MAX_TOKENS, FP16), (MAX_TOKENS + 1, FP32), (64, BF16), (300, FP16),
        (300, FP32), (1500, BF16),
    ],
    ids=str,
)  # fmt: skip
def test_experts_gpu(tokens: int, dtype: torch.dtype, group: int | None) -> None:
    for sizes in ((16, 2048, 768), (16, 200, 72)):
        case = make_fp8_case(random_experts(tokens, 4, 16), *sizes, dtype, group, "cuda")
        check_experts(case)
        if tokens <= MAX_TOKENS:
            check_grouped(case)
    check_experts(make_fp8_case(torch.full((tokens, 1), 3), 5, 256, 160, dtype, group, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [MAX_TOKENS, 64])
def test_a_graph_holds_any_routing_gpu(tokens: int) -> None:
    """Captured with all pairs in one expert, replayed with others."""
    *given, _ = make_fp8_case(random_experts(tokens, 4, 16), 16, 256, 128, BF16, GROUP, "cuda")
    experts = given[1]
    expected, wanted = apply_experts(*given), experts.clone()
    experts.fill_(int(wanted[0, 0]))
    apply_experts(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = apply_experts(*given)
    experts.copy_(wanted)
    graph.replay()
    assert torch.equal(y, expected)


COMPILED = """
import torch
from helpers.compile_launches import RTX_4090, H100, launches
from nanovllm.kernels.experts import apply_experts
from nanovllm.quantization.fp8 import GROUP, Fp8Weight

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def stack(n, k):
    return Fp8Weight(*Fp8Weight.parameters_like(empty(128, n, k), GROUP))

for tokens, card in ((4, H100), (4096, RTX_4090)):
    routing = empty(tokens, 8, dtype=torch.int32), empty(tokens, 8, dtype=torch.float32)
    x = empty(tokens, 2048)
    factors = stack(1536, 2048), stack(2048, 768)
    for launch in launches(apply_experts, x, *routing, *factors, card=card):
        print(launch.name, launch.fits, launch.spills)
"""


@pytest.mark.slow
def test_kernels_compile(tmp_path: Path) -> None:
    lines = run_compiler(COMPILED, tmp_path).splitlines()
    names = [line.split()[0] for line in lines]
    rows, grouped = "_quantize_rows_kernel", "_grouped_gemm_kernel"
    assert names == [
        rows, "_fp8_gate_up_kernel", rows, "_fp8_down_kernel",
        rows, "_plan_kernel", grouped, rows, grouped, "_weighted_sum_kernel",
    ]  # fmt: skip
    assert all(line.endswith("True 0") for line in lines)


def test_tiles_fit() -> None:
    for tokens in (9, 600, 5000):
        tile = tiling(tokens * 8, 128, 1)
        assert tile.block_k == GROUP  # and no more: a block has one scale
        assert (tile.rows + tile.outputs) * tile.block_k * tile.num_stages <= 99 * 1024
