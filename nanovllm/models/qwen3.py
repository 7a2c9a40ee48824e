"""Qwen3, dense (Yang et al. 2025, arXiv:2505.09388): queries and keys are normalised."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from nanovllm.layers.attention import Attention
from nanovllm.layers.mlp import GatedMLP
from nanovllm.models.causal_lm import CausalLM, DecoderLayer
from nanovllm.models.config import ModelConfig, switched_window


@dataclass(frozen=True)
class Qwen3Config(ModelConfig):
    """Names and defaults are those of transformers' class of this name."""

    model_type = "qwen3"

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 32768
    attention_bias: bool = False

    @classmethod
    def window_of(cls, content: dict[str, Any]) -> int | None:
        return switched_window(content)


class Qwen3DecoderLayer(DecoderLayer):
    def __init__(self, config: Qwen3Config, layer_index: int) -> None:
        attention = Attention(
            layer_index, config.hidden_size, config.num_attention_heads,
            config.num_key_value_heads, config.head_dim, qkv_bias=config.attention_bias,
            output_bias=config.attention_bias, qk_norm_eps=config.rms_norm_eps,
        )  # fmt: skip
        super().__init__(config, attention, self.make_mlp(config, layer_index))

    @staticmethod
    def make_mlp(config: Qwen3Config, layer_index: int) -> nn.Module:
        """What comes after attention."""
        return GatedMLP(config.hidden_size, config.intermediate_size, activation=config.hidden_act)


class Qwen3ForCausalLM(CausalLM):
    config_class = Qwen3Config
    layer_class = Qwen3DecoderLayer
