"""Qwen3 with mixtures of experts (Yang et al. 2025, arXiv:2505.09388): 30B-A3B, 235B-A22B."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from nanovllm.layers.moe import SparseMoE
from nanovllm.models.causal_lm import CausalLM
from nanovllm.models.config import DERIVED
from nanovllm.models.qwen3 import Qwen3Config, Qwen3DecoderLayer
from nanovllm.models.sparse_config import SparseConfig

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Qwen3MoeConfig(Qwen3Config, SparseConfig):
    """Names and defaults are those of transformers' class of this name. transformers 5 writes
    `num_experts` as `num_local_experts`."""

    model_type = "qwen3_moe"

    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_key_value_heads: int = 4
    head_dim: int = DERIVED

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Self":
        if "num_experts" not in content and "num_local_experts" in content:
            content = content | {"num_experts": content["num_local_experts"]}
        return super().from_json(content)


class Qwen3MoeDecoderLayer(Qwen3DecoderLayer):
    @staticmethod
    def make_mlp(config: Qwen3Config, layer_index: int) -> nn.Module:
        assert isinstance(config, Qwen3MoeConfig)
        if not config.is_sparse(layer_index):
            return Qwen3DecoderLayer.make_mlp(config, layer_index)
        return SparseMoE(
            config.hidden_size, config.moe_intermediate_size, config.num_experts,
            config.num_experts_per_tok, renormalize=config.norm_topk_prob,
            activation=config.hidden_act,
        )  # fmt: skip


class Qwen3MoeForCausalLM(CausalLM):
    config_class = Qwen3MoeConfig
    layer_class = Qwen3MoeDecoderLayer
