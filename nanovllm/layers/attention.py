"""Grouped-query attention with rotary positions over the paged KV cache."""

import torch
from torch import nn

from nanovllm.layers.deferred import Normed, Product
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import Linear, MergedLinear
from nanovllm.utils.context import AttentionSpec, Context


class Attention(nn.Module):
    """Projections to queries, keys and values, attention, and the projection back.

    Args:
        layer_index: whose keys and values in the KV cache are this layer's.
        hidden_size: of the residual stream.
        num_heads, num_kv_heads: of queries, and of keys and values.
        head_dim: of each.
        qkv_bias, output_bias: whether these projections have a bias.
        qk_norm_eps: normalise each head of queries and keys (QK-norm) with this eps; None: do not.
    """

    def __init__(
        self,
        layer_index: int,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = MergedLinear(hidden_size, parts, qkv_bias)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)
        self.o_proj = Linear(q_size, hidden_size, output_bias)
        self.kv_scales: torch.Tensor | None = None  # see `AttentionSpec`
        self.given_kv_scales: torch.Tensor | None = None  # see `quantization.kv_cache`

    def forward(self, x: Normed, context: Context) -> Product:
        """What is to be added to the stream of `x`; see `Context` for what is read and written."""
        qkv = self.qkv_proj(x)
        cache = context.kv_cache[self.layer_index]
        attended = context.backend.attend(qkv, self.spec(), cache, context)
        if context.output_indices is not None:
            attended = attended[context.output_indices]
        return self.o_proj(attended, tokens=context.output_indices)

    def spec(self) -> AttentionSpec:
        """What the backend needs to know."""
        q_norm, k_norm = self.q_norm, self.k_norm
        return AttentionSpec(
            self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim**-0.5,
            None if q_norm is None else q_norm.weight, None if k_norm is None else k_norm.weight,
            0.0 if q_norm is None else q_norm.eps, self.kv_scales,
        )  # fmt: skip
