"""Qwen3 (dense), written out as in the report (Yang et al. 2025, arXiv:2505.09388).

Module names follow the checkpoint's, so that a parameter's path is its name in the file; packed
projections name their parts (see `checkpoint_views`).
"""

import torch
from torch import nn

from nanovllm.layers.attention import Attend
from nanovllm.layers.embed_head import Embedding, LMHead
from nanovllm.layers.layernorm import Residual, RMSNorm
from nanovllm.layers.linear import GatedLinear, Linear, PackedLinear
from nanovllm.utils.context import Context
from nanovllm.utils.hf_config import Qwen3Config

LayerCache = tuple[torch.Tensor, torch.Tensor]  # one layer's keys and values


class Qwen3Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: Qwen3Config, attend: Attend) -> None:
        super().__init__()
        head_dim, bias = config.head_dim, config.attention_bias
        q_size = config.num_attention_heads * head_dim
        kv_size = config.num_key_value_heads * head_dim
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = PackedLinear(config.hidden_size, parts, bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.o_proj = Linear(q_size, config.hidden_size, bias)
        self.attend = attend
        self.scale = head_dim**-0.5

    def forward(
        self,
        residual: Residual,
        norm: RMSNorm,
        kv_cache: LayerCache,
        context: Context,
        keep: torch.Tensor | None,
    ) -> None:
        qkv = self.qkv_proj(residual, norm)
        norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        attended = self.attend(qkv, norms, *kv_cache, context, self.scale)
        if keep is not None:
            residual.keep(keep)
            attended = attended[keep]
        self.o_proj.add_to(residual, attended)


class Qwen3MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        inner = config.intermediate_size
        self.gate_up_proj = GatedLinear(config.hidden_size, {"gate_proj": inner, "up_proj": inner})
        self.down_proj = Linear(inner, config.hidden_size)

    def forward(self, residual: Residual, norm: RMSNorm) -> None:
        self.down_proj.add_to(residual, self.gate_up_proj(residual, norm))


class Qwen3DecoderLayer(nn.Module):
    """Attention and MLP. Each takes the residual stream through a norm, and adds to it.

    With `keep` only these tokens go on once all have their keys and values.
    """

    def __init__(self, config: Qwen3Config, attend: Attend) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Qwen3Attention(config, attend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Qwen3MLP(config)

    def forward(
        self,
        residual: Residual,
        kv_cache: LayerCache,
        context: Context,
        keep: torch.Tensor | None = None,
    ) -> None:
        self.self_attn(residual, self.input_layernorm, kv_cache, context, keep)
        self.mlp(residual, self.post_attention_layernorm)


class Qwen3Model(nn.Module):
    """Token ids to the residual stream after the last layer; the head applies the final norm."""

    def __init__(self, config: Qwen3Config, attend: Attend) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Qwen3DecoderLayer(config, attend) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        sampled: torch.Tensor,
        kv_cache: torch.Tensor,
        context: Context,
    ) -> Residual:
        residual = Residual(self.embed_tokens(input_ids, sampled))
        *layers, last_layer = zip(self.layers, *kv_cache, strict=True)
        for layer, keys, values in layers:
            layer(residual, (keys, values), context)
        layer, keys, values = last_layer
        layer(residual, (keys, values), context, keep=context.logits_indices)
        return residual


class Qwen3ForCausalLM(nn.Module):
    """The whole network: `forward` runs the layers, `compute_logits` scores the next token.

    Args:
        config: the sizes.
        attend: the attention backend.
    """

    def __init__(self, config: Qwen3Config, attend: Attend) -> None:
        super().__init__()
        self.model = Qwen3Model(config, attend)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        self.is_tied = bool(config.tie_word_embeddings)
        self.tie_weights()

    def forward(
        self,
        input_ids: torch.Tensor,
        sampled: torch.Tensor,
        kv_cache: torch.Tensor,
        context: Context,
    ) -> Residual:
        """The residual stream of one step's tokens, of those whose logits are wanted
        (`context.logits_indices`), before the final norm.

        Args:
            input_ids: [tokens] int32; -1 - i stands for `sampled[i]`.
            sampled: [rows] int64, tokens of the step before.
            kv_cache: [2, layers, num_blocks, block_size, num_kv_heads, head_dim], keys and values;
                those of these tokens are written.
            context: which token belongs where.
        """
        return self.model(input_ids, sampled, kv_cache, context)

    def compute_logits(self, residual: Residual) -> torch.Tensor:
        """What `forward` returns -> [rows, vocab]."""
        return self.lm_head(residual, self.model.norm)

    def tie_weights(self) -> None:
        """Let the head use the embedding's matrix, if the checkpoint says so."""
        if self.is_tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def checkpoint_views(self) -> dict[str, torch.Tensor]:
        """Every tensor a checkpoint must hold, by name, and the memory (views) it is loaded to."""
        views: dict[str, torch.Tensor] = {}
        for path, module in self.named_modules():
            if isinstance(module, PackedLinear):
                parent = path.rpartition(".")[0]
                views |= {f"{parent}.{name}": v for name, v in module.checkpoint_views().items()}
            elif module is not self.lm_head or not self.is_tied:
                parameters = module.named_parameters(recurse=False)
                views |= {f"{path}.{name}": parameter.data for name, parameter in parameters}
        return views
