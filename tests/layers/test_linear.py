"""Linear layers: the formula, packed weights on a CPU, and what is asked of the kernels."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nanovllm.layers import linear as layers_linear
from nanovllm.layers.deferred import Stream
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import Linear, MergedLinear
from nanovllm.layers.packed_weight import OneDnnWeight, one_row_product
from nanovllm.layers.paged_attention import norm_rope_store


def filled(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.requires_grad_(False).parameters():
        parameter.normal_()
    return module


@pytest.mark.parametrize("keep_plain", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_weights_give_the_plain_product(rows: int, bias: bool, keep_plain: bool):
    torch.manual_seed(0)
    linear = filled(Linear(96, 40, bias).to(torch.bfloat16))
    if not OneDnnWeight.serves(linear.weight):
        pytest.skip("oneDNN has no packed matrices here")
    x, norm = torch.randn(rows, 96).bfloat16(), RMSNorm(96, 1e-6).to(torch.bfloat16)
    norm.weight.data.fill_(1.0)
    expected = F.linear(norm(Stream(x)).values().double(), linear.weight.double())
    if bias:
        expected += linear.bias.double()
    linear.pack(keep_plain)
    out = linear(norm(Stream(x))).values()
    assert out.dtype == torch.bfloat16
    assert ((out.double() - expected).norm() / expected.norm()).item() < 1e-2
    total = Stream(torch.zeros_like(out)) + linear(norm(Stream(x)))
    assert ((total.x.double() - expected).norm() / expected.norm()).item() < 1e-2


@pytest.mark.parametrize("keep_plain", [False, True])
def test_a_weight_is_the_same_after_unpacking(keep_plain: bool):
    linear = filled(Linear(96, 40).to(torch.bfloat16))
    before = linear.weight.clone()
    linear.pack(keep_plain)
    linear.unpack()
    assert torch.equal(linear.weight, before)
    assert linear._packed is None


@pytest.mark.parametrize("was_on", [True, False])
def test_the_product_of_one_row_leaves_the_switch_of_onednn_as_it_was(was_on: bool):
    weight, x = torch.randn(40, 96).bfloat16(), torch.randn(1, 96).bfloat16()
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, was_on
    try:
        one_row_product(x, weight)
        assert torch.backends.mkldnn.enabled == was_on
        with pytest.raises(RuntimeError, match="shape"):
            one_row_product(x, weight.T)
        assert torch.backends.mkldnn.enabled == was_on
    finally:
        torch.backends.mkldnn.enabled = before


def test_packing_a_head_leaves_the_embedding_that_it_shares_as_it_is():
    weight = torch.nn.Parameter(torch.randn(40, 96).bfloat16(), requires_grad=False)
    linear, before = Linear(96, 40), weight.clone()
    linear.weight = weight
    linear.pack()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_a_gated_product_is_activation_of_gate_times_up(activation: str, bias: bool):
    torch.manual_seed(0)
    linear = filled(MergedLinear(32, {"gate_proj": 24, "up_proj": 24}, bias))
    x = torch.randn(3, 32)
    gate, up = F.linear(x, linear.weight, linear.bias).chunk(2, dim=1)
    expected = {
        "silu": F.silu(gate),
        "gelu": F.gelu(gate),
        "gelu_pytorch_tanh": F.gelu(gate, approximate="tanh"),
    }[activation] * up
    torch.testing.assert_close(linear(x).gated(activation), expected)


def store_args(tokens: int, num_kv_heads: int, head_dim: int) -> tuple:
    """What `norm_rope_store` takes besides q/k/v, with an empty cache."""
    cache = [torch.zeros(2, 4, num_kv_heads, head_dim) for _ in range(2)]
    order = torch.randperm(8)[:tokens].int()
    return (None, None, 0.0, torch.randn(8, head_dim), order, *cache, order)


def test_a_stored_product_is_stored_as_its_values_are():
    torch.manual_seed(0)
    linear = filled(MergedLinear(32, {"q_proj": 32, "k_proj": 16, "v_proj": 16}, bias=True))
    x, where = torch.randn(5, 32), store_args(5, 2, 8)
    expected_where = tuple(deepcopy(where))
    expected = norm_rope_store(linear(x).values(), *expected_where)
    assert torch.equal(linear(x).stored(*where), expected)
    for cache, expected_cache in zip(where[5:7], expected_where[5:7]):
        assert torch.equal(cache, expected_cache)


def test_kernels_get_all_that_a_stored_product_needs(monkeypatch: pytest.MonkeyPatch):
    linear, x, calls = filled(Linear(32, 24, bias=True)), torch.randn(3, 32), []
    kernels = SimpleNamespace(store_matmul=lambda *args: calls.append(args) or "queries")
    monkeypatch.setattr(layers_linear, "has_kernels", lambda tensor: True)
    monkeypatch.setattr(layers_linear, "kernels", kernels)
    assert linear(x).stored("norms", "cache") == "queries"
    assert calls == [(x, linear.weight, linear.bias, "norms", "cache")]


def test_a_product_goes_to_the_memory_that_is_given():
    torch.manual_seed(0)
    linear, x, out = filled(Linear(32, 24, bias=True)), torch.randn(3, 32), torch.empty(3, 24)
    assert linear(x).values(out) is out
    assert torch.equal(out, linear(x).values())


def test_parts_of_a_packed_projection_have_the_names_of_the_checkpoint():
    linear = MergedLinear(8, {"q_proj": 4, "k_proj": 2}, bias=True)
    views = linear.checkpoint_views("model.layers.3.self_attn.qkv_proj")
    names = [f"{part}_proj.{kind}" for kind in ("weight", "bias") for part in "qk"]
    assert sorted(views) == sorted(f"model.layers.3.self_attn.{name}" for name in names)
    views["model.layers.3.self_attn.k_proj.bias"].memory.fill_(7.0)
    assert linear.bias[4:].tolist() == [7.0, 7.0]
