"""Mistral 7B (Jiang et al. 2023, arXiv:2310.06825) and Nemo: Llama's layer without biases, and a
sliding window in the first version."""

from dataclasses import dataclass
from typing import Any

from nanovllm.layers.attention import Attention
from nanovllm.layers.mlp import GatedMLP
from nanovllm.models.causal_lm import CausalLM, DecoderLayer
from nanovllm.models.config import DERIVED, ModelConfig


@dataclass(frozen=True)
class MistralConfig(ModelConfig):
    """Names and defaults are those of transformers' class of this name."""

    model_type = "mistral"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = DERIVED
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096
    eos_token_id: int | list[int] | None = 2

    @classmethod
    def window_of(cls, content: dict[str, Any]) -> int | None:
        return content.get("sliding_window", cls.sliding_window)


class MistralDecoderLayer(DecoderLayer):
    def __init__(self, config: MistralConfig, layer_index: int) -> None:
        attention = Attention(
            layer_index, config.hidden_size, config.num_attention_heads,
            config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        mlp = GatedMLP(config.hidden_size, config.intermediate_size, activation=config.hidden_act)
        super().__init__(config, attention, mlp)


class MistralForCausalLM(CausalLM):
    config_class = MistralConfig
    layer_class = MistralDecoderLayer
