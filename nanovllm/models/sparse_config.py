"""The config of a family whose layers may be mixtures of experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from nanovllm.models.config import MAX_SIZE, ModelConfig, refusal

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class SparseConfig(ModelConfig):
    """What such a family's config has besides. It is the second base of its class; the first is the
    config of the dense models that it is like.

    Attributes:
        moe_intermediate_size: of each expert; `intermediate_size` is that of dense layers.
        norm_topk_prob: the weights of the chosen experts are divided by their sum.
        decoder_sparse_step: every so many layers have experts, the others are dense;
        mlp_only_layers: and so are those of these indices.
    """

    own_sizes: ClassVar[tuple[str, ...]] = (
        "moe_intermediate_size", "num_experts", "num_experts_per_tok", "decoder_sparse_step",
    )  # fmt: skip

    moe_intermediate_size: int = 768
    num_experts: int = 128
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: Sequence[int] = ()

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Self":
        return super().from_json(
            content | {"mlp_only_layers": content.get("mlp_only_layers") or []}
        )

    def is_sparse(self, layer_index: int) -> bool:
        """Whether a layer has experts."""
        is_step = (layer_index + 1) % self.decoder_sparse_step == 0
        return is_step and layer_index not in self.mlp_only_layers

    @property
    def inner_sizes(self) -> tuple[str, ...]:
        sizes = {False: "intermediate_size", True: "moe_intermediate_size"}
        return tuple(sizes[self.is_sparse(index)] for index in self.layer_kinds())

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
