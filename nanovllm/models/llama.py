"""Llama 2 and 3 (Touvron et al. 2023, arXiv:2307.09288; Grattafiori et al. 2024, arXiv:2407.21783),
and the many models that share their architecture."""

from dataclasses import dataclass

from nanovllm.layers.attention import Attention
from nanovllm.layers.mlp import GatedMLP
from nanovllm.models.causal_lm import CausalLM, DecoderLayer
from nanovllm.models.config import DERIVED, ModelConfig


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """Names and defaults are those of transformers' class of this name."""

    model_type = "llama"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = DERIVED
    head_dim: int = DERIVED
    max_position_embeddings: int = 2048
    eos_token_id: int | list[int] | None = 2
    attention_bias: bool = False
    mlp_bias: bool = False


class LlamaDecoderLayer(DecoderLayer):
    def __init__(self, config: LlamaConfig, layer_index: int) -> None:
        attention = Attention(
            layer_index, config.hidden_size, config.num_attention_heads,
            config.num_key_value_heads, config.head_dim, qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
        )  # fmt: skip
        mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, bias=config.mlp_bias,
            activation=config.hidden_act,
        )  # fmt: skip
        super().__init__(config, attention, mlp)


class LlamaForCausalLM(CausalLM):
    config_class = LlamaConfig
    layer_class = LlamaDecoderLayer
