"""The frame of a decoder-only language model: embedding, layers, norm, output head.

A family's file gives its config and its decoder layer, and this frame the rest. Module names follow
the checkpoint's, so that a parameter's path is its name in the file; packed projections name their
parts.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from nanovllm.layers.attention import Attention
from nanovllm.layers.deferred import Stream
from nanovllm.layers.embed_head import Embedding, LMHead
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import rope_cos_sin
from nanovllm.models.config import ModelConfig
from nanovllm.utils.context import Context
from nanovllm.utils.loader import View


class LayerCacheSpec(NamedTuple):
    """What a layer keeps of each token: keys and values of so many heads of this size."""

    num_kv_heads: int
    head_dim: int


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream (pre-norm)."""

    def __init__(self, config: ModelConfig, self_attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x: Stream, context: Context) -> Stream:
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids to the residual stream after the last layer.

    `norm`, which `CausalLM.compute_logits` applies, is here for its name in the checkpoint.
    """

    def __init__(self, config: ModelConfig, layer_class: type[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        make_layer: Any = layer_class
        self.layers = nn.ModuleList(make_layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: torch.Tensor, sampled: torch.Tensor, context: Context) -> Stream:
        x = Stream(self.embed_tokens(input_ids, sampled))
        # After the last layer's attention, only tokens go on whose logits are wanted.
        *layers, last_layer = self.layers
        for layer in layers:
            x = layer(x, context)
        return last_layer(x, context.for_last_layer())


class CausalLM(nn.Module):
    """The whole network: `forward` runs the layers, `compute_logits` scores the next token.

    A family's class sets `config_class`, and `layer_class`: an `nn.Module` made of (config, index
    of the layer), whose forward takes (stream, context) and returns the stream.
    """

    config_class: ClassVar[type[ModelConfig]]
    layer_class: ClassVar[type[nn.Module]]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, self.layer_class)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        self.is_tied = bool(config.tie_word_embeddings)
        self.tie_weights()

    def forward(self, input_ids: torch.Tensor, sampled: torch.Tensor, context: Context) -> Stream:
        """The residual stream of one step's tokens, of those whose logits are wanted
        (`context.logits_indices`), before the final norm.

        Args:
            input_ids: [tokens] int32; -1 - i stands for `sampled[i]`.
            sampled: [rows] int64, tokens of the step before.
            context: which token belongs where; keys and values of these tokens are written to its
                cache.
        """
        return self.model(input_ids, sampled, context)

    def compute_logits(self, stream: Stream, out: torch.Tensor | None = None) -> torch.Tensor:
        """What `forward` returns -> [rows, vocab]; in the memory of `out` if that is given."""
        return self.lm_head(self.model.norm(stream)).values(out)

    def cache_specs(self) -> list[LayerCacheSpec]:
        """What each layer caches."""
        attentions = [module for module in self.modules() if isinstance(module, Attention)]
        return [LayerCacheSpec(layer.num_kv_heads, layer.head_dim) for layer in attentions]

    def rotary_table(self, max_len: int, device: torch.device) -> torch.Tensor:
        """Cosines and sines of positions 0 to max_len - 1; see `layers.rotary_embedding`."""
        return rope_cos_sin(self.config, max_len, device)

    def tie_weights(self) -> None:
        """Let the head use the embedding's matrix, if the checkpoint says so."""
        if self.is_tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def checkpoint_views(self) -> dict[str, View]:
        """Every tensor that a checkpoint must hold, by name, and where it goes. A module may say it
        of its own parameters, given its path."""
        views: dict[str, View] = {}
        for path, module in self.named_modules():
            if module is self or (module is self.lm_head and self.is_tied):
                continue
            if hasattr(module, "checkpoint_views"):
                views |= module.checkpoint_views(path)
            else:
                own = module.named_parameters(recurse=False)
                views |= {f"{path}.{name}": View.whole(parameter.data) for name, parameter in own}
        return views

    def ignored_tensors(self) -> frozenset[str]:
        """Tensors that a checkpoint may hold, and that are not read."""
        return frozenset(["lm_head.weight"] if self.is_tied else [])
