"""Keys and values in fp8 (e4m3): half the bytes of bf16, and twice the context in the same memory.

e4m3 has 3 bits after the point from 2^-6 to 448, and fewer below. So each kv head's keys, and its
values, are divided by a scale that brings their root mean square to 8: what is 56 times as large
still fits, and what is 1/512 of it is as precise as the rest. A scale follows from the weights, no
data is needed. The input of the projection is normalised, so an output feature with weights w and
bias b behind a norm with weights g has about the mean square sum_i (w_i g_i)^2 + b^2; behind
QK-norm keys have that of its weights. RoPE changes no mean square. Scales are powers of two, by
which nothing is rounded.
"""

import torch

from nanovllm.layers.attention import Attention
from nanovllm.models.causal_lm import CausalLM, DecoderLayer

_TARGET = 8.0  # root mean square of what is stored


def allocate_kv_scales(model: CausalLM, device: torch.device) -> None:
    """Give each layer's attention its `kv_scales`, for `set_kv_scales`."""
    for attention in model.modules():
        if isinstance(attention, Attention):
            attention.kv_scales = torch.ones(2, attention.num_kv_heads, device=device)


@torch.inference_mode()
def set_kv_scales(model: CausalLM) -> None:
    """Set all `kv_scales`, in place, by the weights as they are now."""
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            attention = layer.self_attn
            assert isinstance(attention, Attention) and attention.kv_scales is not None
            attention.kv_scales.copy_(_scales(attention, layer.input_layernorm.weight))


def _scales(attention: Attention, norm_weight: torch.Tensor) -> torch.Tensor:
    projection, head_dim = attention.qkv_proj, attention.head_dim
    parts = projection.parts.values()
    _, *weights = projection.whole_weight().split([*parts])
    biases = [None, None]
    if projection.bias is not None:
        _, *biases = projection.bias.split([*parts])
    squares = []
    for weight, bias in zip(weights, biases, strict=True):
        of_features = (weight.float() * norm_weight.float()).square().sum(dim=1)
        if bias is not None:
            of_features += bias.float().square()
        squares.append(of_features.view(-1, head_dim).mean(dim=1))
    if attention.k_norm is not None:
        squares[0] = attention.k_norm.weight.float().square().mean().expand_as(squares[0])
    sizes = torch.stack(squares).sqrt().clamp(min=1e-30)
    return torch.exp2((sizes / _TARGET).log2().round())
