"""Linear layers, and the kernels that they choose."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels.gemv import gemv_torch
from nanovllm.kernels.split_k import split_k_torch
from nanovllm.layers import linear as layers_linear
from nanovllm.layers.layernorm import Residual, RMSNorm
from nanovllm.layers.linear import GatedLinear, Linear, can_pack
from nanovllm.models.qwen3 import Qwen3DecoderLayer


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_weights_give_the_plain_product(rows: int, bias: bool):
    torch.manual_seed(0)
    linear = Linear(96, 40, bias).to(torch.bfloat16).requires_grad_(False)
    if not can_pack(linear.weight):
        pytest.skip("oneDNN has no packed matrices here")
    for parameter in linear.parameters():
        parameter.normal_()
    x, norm = torch.randn(rows, 96).bfloat16(), RMSNorm(96, 1e-6).to(torch.bfloat16)
    norm.weight.data.fill_(1.0)
    expected = F.linear(norm(Residual(x)).double(), linear.weight.double())
    if bias:
        expected += linear.bias.double()
    linear.pack()
    out = linear(Residual(x), norm)
    assert out.dtype == torch.bfloat16
    assert ((out.double() - expected).norm() / expected.norm()).item() < 1e-2
    total = Residual(out.clone())
    linear.add_to(total, x)
    assert not torch.equal(total.x, out)


@pytest.mark.parametrize("bias", [False, True])
def test_any_kernel_may_follow_any_other(monkeypatch: pytest.MonkeyPatch, bias: bool):
    """Two layers, their products by any mixture of the GPU's kernels, or rather their twins."""
    config = SimpleNamespace(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, attention_bias=bias, rms_norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(0)
    layers = [Qwen3DecoderLayer(config, lambda qkv, *_: qkv[:, :64].tanh()) for _ in range(2)]
    for layer in layers:
        for parameter in layer.requires_grad_(False).parameters():
            parameter.normal_().mul_(parameter.shape[-1] ** -0.5)
    x, keep = torch.randn(3, 32), torch.tensor([0, 2])

    def run() -> torch.Tensor:
        residual = Residual(x.clone())
        layers[0](residual, (None, None), None)
        layers[1](residual, (None, None), None, keep)
        return residual.rows(slice(None)).x

    expected = run()
    monkeypatch.setattr(layers_linear, "gemv_triton", gemv_torch)
    monkeypatch.setattr(layers_linear, "split_k_triton", split_k_torch)
    inner_sizes = (32, 48, 64)  # of q/k/v and gate/up, of down, of output
    for chosen in product([False, True], repeat=6):
        gemv, split_k = (dict(zip(inner_sizes, half)) for half in (chosen[:3], chosen[3:]))
        for name, sizes in (("can_gemv", gemv), ("can_split_k", split_k)):
            monkeypatch.setattr(
                layers_linear, name, lambda x, *_, sizes=sizes, **__: sizes[x.shape[1]]
            )
        torch.testing.assert_close(run(), expected)


def test_what_goes_to_split_k_and_how(monkeypatch: pytest.MonkeyPatch):
    asked, made = [], []

    def can_split_k(x, out_features, in_parts=False):
        asked.append((out_features, in_parts))
        return True

    def split_k(x, weight, splits=None, gated=False):
        made.append((weight.shape[0], splits, gated))
        return split_k_torch(x, weight, splits, gated)

    monkeypatch.setattr(layers_linear, "can_split_k", can_split_k)
    monkeypatch.setattr(layers_linear, "split_k_triton", split_k)
    norm, linear = RMSNorm(32, 1e-6), Linear(32, 32)
    gated = GatedLinear(32, {"gate_proj": 48, "up_proj": 48})
    for module in (norm, linear, gated):
        for parameter in module.requires_grad_(False).parameters():
            parameter.normal_()
    residual = Residual(torch.randn(3, 32))
    x = linear(residual, norm)
    gated(residual, norm)
    linear.add_to(residual, x)
    assert asked == [(32, False), (96, False), (32, True)]
    assert made == [(32, None, False), (96, None, True), (32, 8, False)]
    assert residual.partials.shape == (8, 3, 32)
