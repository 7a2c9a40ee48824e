"""Qwen2 and Qwen2.5, dense (Yang et al. 2024, arXiv:2407.10671): q/k/v projections have a bias."""

from dataclasses import dataclass
from typing import Any

from nanovllm.layers.attention import Attention
from nanovllm.layers.mlp import GatedMLP
from nanovllm.models.causal_lm import CausalLM, DecoderLayer
from nanovllm.models.config import DERIVED, ModelConfig, switched_window


@dataclass(frozen=True)
class Qwen2Config(ModelConfig):
    """Names and defaults are those of transformers' class of this name."""

    model_type = "qwen2"

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = DERIVED
    max_position_embeddings: int = 32768

    @classmethod
    def window_of(cls, content: dict[str, Any]) -> int | None:
        return switched_window(content)


class Qwen2DecoderLayer(DecoderLayer):
    def __init__(self, config: Qwen2Config, layer_index: int) -> None:
        attention = Attention(
            layer_index, config.hidden_size, config.num_attention_heads,
            config.num_key_value_heads, config.head_dim, qkv_bias=True,
        )  # fmt: skip
        mlp = GatedMLP(config.hidden_size, config.intermediate_size, activation=config.hidden_act)
        super().__init__(config, attention, mlp)


class Qwen2ForCausalLM(CausalLM):
    config_class = Qwen2Config
    layer_class = Qwen2DecoderLayer
