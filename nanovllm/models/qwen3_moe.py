"""Qwen3 with mixtures of experts (Yang et al. 2025, arXiv:2505.09388): 30B-A3B, 235B-A22B."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from nanovllm.layers.moe import SparseMoE
from nanovllm.models.causal_lm import CausalLM
from nanovllm.models.config import DERIVED, MAX_SIZE, refusal
from nanovllm.models.qwen3 import Qwen3Config, Qwen3DecoderLayer

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Qwen3MoeConfig(Qwen3Config):
    """Names and defaults are those of transformers' class of this name.

    Attributes:
        moe_intermediate_size: of each expert; `intermediate_size` is that of dense layers.
        num_experts: transformers 5 writes it as `num_local_experts`.
        norm_topk_prob: the weights of the chosen experts are divided by their sum.
        decoder_sparse_step: every so many layers have experts, the others are dense;
        mlp_only_layers: and so are those of these indices.
    """

    model_type = "qwen3_moe"
    own_sizes = (
        "moe_intermediate_size", "num_experts", "num_experts_per_tok", "decoder_sparse_step",
    )  # fmt: skip

    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_key_value_heads: int = 4
    head_dim: int = DERIVED
    moe_intermediate_size: int = 768
    num_experts: int = 128
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: Sequence[int] = ()

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Self":
        given = {"mlp_only_layers": content.get("mlp_only_layers") or []}
        if "num_experts" not in content and "num_local_experts" in content:
            given["num_experts"] = content["num_local_experts"]
        return super().from_json(content | given)

    def is_sparse(self, layer_index: int) -> bool:
        """Whether a layer has experts."""
        is_step = (layer_index + 1) % self.decoder_sparse_step == 0
        return is_step and layer_index not in self.mlp_only_layers

    @property
    def inner_sizes(self) -> tuple[str, ...]:
        return ("intermediate_size", "moe_intermediate_size")

    def layer_kinds(self) -> dict[int, int]:
        num_layers, step = self.num_hidden_layers, self.decoder_sparse_step
        may_be_sparse = range(step - 1, num_layers, step)
        excepted = {index for index in self.mlp_only_layers if index in may_be_sparse}
        num_sparse = len(may_be_sparse) - len(excepted)
        kinds = {}
        if num_sparse:
            kinds[next(index for index in may_be_sparse if index not in excepted)] = num_sparse
        if num_sparse < num_layers:
            kinds[0 if step > 1 else min(excepted)] = num_layers - num_sparse
        return kinds

    def _check_values(self) -> None:
        super()._check_values()
        if self.num_experts_per_tok > self.num_experts:
            raise refusal("num_experts_per_tok", self.num_experts_per_tok)
        if self.num_experts * self.moe_intermediate_size > MAX_SIZE:
            raise refusal("moe_intermediate_size", self.moe_intermediate_size)
        layers = self.mlp_only_layers
        if not isinstance(layers, list) or not all(type(index) is int for index in layers):
            raise refusal("mlp_only_layers", layers)


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
