"""Qwen2 with mixtures of experts, one of them for all tokens (Yang et al. 2024, arXiv:2407.10671):
57B-A14B, and Qwen1.5-MoE-A2.7B."""

from dataclasses import dataclass

from torch import nn

from nanovllm.layers.attention import Attention
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.moe import SparseMoE
from nanovllm.models.causal_lm import CausalLM, DecoderLayer
from nanovllm.models.qwen2 import Qwen2Config
from nanovllm.models.sparse_config import SparseConfig


@dataclass(frozen=True)
class Qwen2MoeConfig(Qwen2Config, SparseConfig):
    """Names and defaults are those of transformers' class of this name."""

    model_type = "qwen2_moe"
    own_sizes = (*SparseConfig.own_sizes, "shared_expert_intermediate_size")

    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    moe_intermediate_size: int = 1408
    num_experts: int = 60
    num_experts_per_tok: int = 4
    shared_expert_intermediate_size: int = 5632
    qkv_bias: bool = True

    @property
    def inner_sizes(self) -> tuple[str, ...]:
        sizes = super().inner_sizes
        has_experts = "moe_intermediate_size" in sizes
        return (*sizes, "shared_expert_intermediate_size") if has_experts else sizes


class Qwen2MoeDecoderLayer(DecoderLayer):
    def __init__(self, config: Qwen2MoeConfig, layer_index: int) -> None:
        attention = Attention(
            layer_index, config.hidden_size, config.num_attention_heads,
            config.num_key_value_heads, config.head_dim, qkv_bias=config.qkv_bias,
        )  # fmt: skip
        mlp: nn.Module
        if config.is_sparse(layer_index):
            mlp = SparseMoE(
                config.hidden_size, config.moe_intermediate_size, config.num_experts,
                config.num_experts_per_tok, renormalize=config.norm_topk_prob,
                shared_size=config.shared_expert_intermediate_size, activation=config.hidden_act,
            )  # fmt: skip
        else:
            mlp = GatedMLP(
                config.hidden_size, config.intermediate_size, activation=config.hidden_act
            )
        super().__init__(config, attention, mlp)


class Qwen2MoeForCausalLM(CausalLM):
    config_class = Qwen2MoeConfig
    layer_class = Qwen2MoeDecoderLayer
