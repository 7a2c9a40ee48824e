"""Streams, norms and products that are made when they are used, by any mixture of kernels."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels import linear as kernels_linear
from nanovllm.kernels.choice import Kernel
from nanovllm.layers import layernorm as layers_layernorm
from nanovllm.layers import linear as layers_linear
from nanovllm.layers.deferred import Stream
from nanovllm.layers.layernorm import RMSNorm, rms_norm
from nanovllm.layers.linear import Linear
from nanovllm.models.llama import LlamaConfig, LlamaDecoderLayer


def test_a_norm_is_computed_once_and_for_all_who_use_it(monkeypatch: pytest.MonkeyPatch):
    norm, x = RMSNorm(8, 1e-6).requires_grad_(False), torch.randn(3, 8)
    norm.weight.fill_(2.0)
    calls = []
    normalize = RMSNorm.normalize
    monkeypatch.setattr(RMSNorm, "normalize", lambda *a: calls.append(a) or normalize(*a))
    normed = norm(Stream(x))
    assert not calls
    values = normed.values()
    assert normed.values() is values and len(calls) == 1
    torch.testing.assert_close(values, F.rms_norm(x, (8,), eps=1e-6) * 2)


def test_partial_sums_are_added_by_the_norm_or_by_the_next_addition():
    norm = RMSNorm(8, 1e-6).requires_grad_(False)
    norm.weight.fill_(1.0)
    x, partials = torch.randn(3, 8), torch.randn(4, 3, 8)
    total = x + partials.sum(dim=0)
    stream = Stream(x.clone(), partials)
    torch.testing.assert_close(norm(stream).values(), F.rms_norm(total, (8,), eps=1e-6))
    torch.testing.assert_close(stream.x, total)
    assert stream.partials is None
    torch.testing.assert_close((Stream(x.clone(), partials) + torch.ones(3, 8)).x, total + 1)
    torch.testing.assert_close(Stream(x.clone(), partials)[1:].x, total[1:])


def test_a_stream_that_was_added_to_is_used_up():
    """Its memory holds the sum: whoever still reads it would read another value."""
    norm, linear = RMSNorm(8, 1e-6), Linear(8, 8)
    stream = Stream(torch.randn(3, 8))
    before = norm(stream)
    stream + linear(torch.randn(3, 8))
    with pytest.raises(RuntimeError, match="added to"):
        before.values()
    with pytest.raises(RuntimeError, match="added to"):
        stream + torch.ones(3, 8)


def test_a_product_of_some_tokens_leaves_a_stream_of_these():
    linear = Linear(8, 8).requires_grad_(False)
    linear.weight.normal_()
    x, tokens = torch.randn(5, 8), torch.tensor([1, 4])
    out = Stream(x.clone()) + linear(x[tokens], tokens)
    torch.testing.assert_close(out.x, x[tokens] + x[tokens] @ linear.weight.T)


# Weights in fp8 are in tests/kernels/test_fp8_linear.py, what stores keys and values in
# test_qkv_gemm.py.
PLAIN_KERNELS = [one for one in Kernel if one not in (Kernel.FP8_GEMM, Kernel.QKV_GEMM)]
NO_BIAS = (Kernel.TILED_GEMM, Kernel.GATED_GEMM)  # see tests/kernels/test_choice.py


class StandInKernels:
    """The kernels' interface over plain torch, each product made as the kernel chosen would."""

    def __init__(self, chosen: dict[tuple[int, int], Kernel]) -> None:
        self.chosen = chosen  # by the weight's shape

    def _y(self, x: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            return F.linear(x, weight, bias)
        if self.chosen[weight.shape] is Kernel.GEMV and x.partials is None:
            return F.linear(rms_norm(x.x, x.weight, x.eps), weight, bias)
        return F.linear(x.values(), weight, bias)

    def matmul(self, x, weight, bias=None, out=None):
        return self._y(x, weight, bias)

    def gated_matmul(self, x, weight, bias=None):
        gate, up = self._y(x, weight, bias).chunk(2, dim=1)
        return F.silu(gate) * up

    def add_matmul(self, stream, x, weight, bias=None):
        y = F.linear(x, weight, bias)
        if self.chosen[weight.shape] in (Kernel.SPLIT_K, Kernel.TILED_GEMM):
            return torch.stack((y * 0.25, y * 0.75))
        stream.add_(y)
        return None

    @staticmethod
    def rms_norm(x, weight, eps, partials, out=None):
        assert out is None
        return rms_norm(x, weight, eps, partials)


@pytest.mark.parametrize("bias", [False, True])
def test_any_kernel_may_follow_any_other(monkeypatch: pytest.MonkeyPatch, bias: bool):
    """Two layers, their products by any mixture of kernels, or rather of stand-ins for them."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, attention_bias=bias, mlp_bias=bias,
    )  # fmt: skip
    torch.manual_seed(0)
    layers = [LlamaDecoderLayer(config, index) for index in range(2)]
    for layer in layers:
        for parameter in layer.requires_grad_(False).parameters():
            parameter.normal_().mul_(parameter.shape[-1] ** -0.5)
    backend = SimpleNamespace(attend=lambda qkv, *_: qkv.values()[:, :64].tanh())
    x, kept = torch.randn(3, 32), torch.tensor([0, 2])

    def run() -> torch.Tensor:
        context = SimpleNamespace(backend=backend, kv_cache=[None, None], output_indices=None)
        stream = layers[0](Stream(x.clone()), context)
        context.output_indices = kept
        return layers[1](stream, context).values()

    expected = run()
    shapes = {m.weight.shape for m in layers[0].modules() if isinstance(m, Linear)}
    assert len(shapes) == 4
    for module in (layers_linear, layers_layernorm):
        monkeypatch.setattr(module, "has_kernels", lambda tensor: True)
    for chosen in product(PLAIN_KERNELS, repeat=4):
        kernels = StandInKernels(dict(zip(shapes, chosen, strict=True)))
        for module in (layers_linear, layers_layernorm):
            monkeypatch.setattr(module, "kernels", kernels)
        torch.testing.assert_close(run(), expected)


def test_an_activation_that_no_kernel_has_takes_the_plain_path(monkeypatch: pytest.MonkeyPatch):
    linear, x = Linear(8, 12).requires_grad_(False), torch.randn(2, 8)
    linear.weight.normal_()
    expected = linear(x).gated("gelu")
    monkeypatch.setattr(layers_linear, "has_kernels", lambda tensor: True)

    class Kernels:
        matmul = staticmethod(lambda x, weight, bias, out: F.linear(x, weight, bias))
        # no gated_matmul: that is SiLU's

    monkeypatch.setattr(layers_linear, "kernels", Kernels)
    torch.testing.assert_close(linear(x).gated("gelu"), expected)


class Recorder:
    """Notes which kernel was called, with what."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def gemv(self, x, weight, bias=None, norm_weight=None, eps=0.0, **options):
        facts = {"bias": bias is not None, "norm": norm_weight is not None}
        facts |= {name: value is not None and value is not False for name, value in options.items()}
        self.calls.append(("gemv", facts))
        return torch.zeros(x.shape[0], weight.shape[0])

    def tiled_gemm(self, x, weight, splits=None, gated=False, out=None):
        facts = {"bias": False, "splits": splits is not None, "gated": gated}
        self.calls.append(("tiled_gemm", facts))
        return torch.zeros(x.shape[0], weight.shape[0])

    def gated_gemm(self, x, weight):
        self.calls.append(("gated_gemm", {}))
        return torch.zeros(x.shape[0], weight.shape[0] // 2)

    def split_k(self, x, weight, bias=None, splits=None, gated=False, out=None):
        facts = {"bias": bias is not None, "splits": splits is not None, "gated": gated}
        self.calls.append(("split_k", facts))
        return torch.zeros(x.shape[0], weight.shape[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", PLAIN_KERNELS)
def test_the_kernel_that_is_chosen_gets_all_that_is_asked(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, bias: bool
):
    """A bias, a norm, a gate, a residual: nothing is dropped on the way to a kernel."""
    if kernel in NO_BIAS and bias:
        pytest.skip("it is not chosen")
    recorder = Recorder()
    monkeypatch.setattr(kernels_linear, "gemv", recorder.gemv)
    monkeypatch.setattr(kernels_linear, "split_k", recorder.split_k)
    monkeypatch.setattr(kernels_linear, "tiled_gemm", recorder.tiled_gemm)
    monkeypatch.setattr(kernels_linear, "gated_gemm", recorder.gated_gemm)
    monkeypatch.setattr(kernels_linear, "_choose", lambda *_: kernel)
    monkeypatch.setattr(
        kernels_linear, "silu_and_mul", lambda y: F.silu(y[:, :4]) * y[:, 4:]
    )  # it is a kernel, too
    norm, linear = RMSNorm(8, 1e-6).requires_grad_(False), Linear(8, 8, bias).requires_grad_(False)
    for parameter in (norm.weight, *linear.parameters()):
        parameter.normal_()
    x, out = torch.randn(2, 8), torch.empty(2, 8)
    args = (linear.weight, linear.bias)
    stream = torch.randn(2, 8)
    expected = F.linear(rms_norm(x, norm.weight, norm.eps), *args)
    values = kernels_linear.matmul(norm(Stream(x)), *args)
    kernels_linear.matmul(norm(Stream(x)), *args, out=out)
    gated = kernels_linear.gated_matmul(norm(Stream(x)), *args)
    added = stream.clone()
    partials = kernels_linear.add_matmul(added, x, *args)
    if kernel in (Kernel.LIBRARY, Kernel.GATED_GEMM):
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(added, stream + F.linear(x, *args))
        assert partials is None
        if kernel is Kernel.GATED_GEMM:
            assert recorder.calls == [("gated_gemm", {})]
        else:
            torch.testing.assert_close(gated, F.silu(expected[:, :4]) * expected[:, 4:])
            assert not recorder.calls
        return
    if kernel is Kernel.GEMV:
        expected_calls = [
            ("gemv", {"bias": bias, "norm": True, "out": False}),
            ("gemv", {"bias": bias, "norm": True, "out": True}),
            ("gemv", {"bias": bias, "norm": True, "gated": True}),
            ("gemv", {"bias": bias, "norm": False, "add_to": True}),
        ]
        assert partials is None
    else:
        expected_calls = [
            (kernel.value, {"bias": bias, "splits": False, "gated": False}),
            (kernel.value, {"bias": bias, "splits": False, "gated": False}),
            (kernel.value, {"bias": bias, "splits": False, "gated": True}),
            (kernel.value, {"bias": bias, "splits": True, "gated": False}),
        ]
        assert partials is not None
    assert recorder.calls == expected_calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", PLAIN_KERNELS)
def test_a_ranks_summand_has_the_bias_and_no_stream(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, bias: bool
):
    if kernel in NO_BIAS and bias:
        pytest.skip("it is not chosen")
    recorder = Recorder()
    for name in ("gemv", "split_k", "tiled_gemm"):
        monkeypatch.setattr(kernels_linear, name, getattr(recorder, name))
    monkeypatch.setattr(kernels_linear, "_choose", lambda *_: kernel)
    linear = Linear(8, 8, bias).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.normal_()
    x = torch.randn(2, 8)
    found = kernels_linear.summands(x, linear.weight, linear.bias)
    if kernel in (Kernel.LIBRARY, Kernel.GATED_GEMM):
        torch.testing.assert_close(found, F.linear(x, linear.weight, linear.bias))
    elif kernel is Kernel.GEMV:
        assert recorder.calls == [("gemv", {"bias": bias, "norm": False})]
    else:
        assert recorder.calls == [(kernel.value, {"bias": bias, "splits": True, "gated": False})]
