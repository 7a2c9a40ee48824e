"""What the layers need to know of a step, handed down the model as an argument."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from nanovllm.layers.deferred import Product

LayerCache = tuple[torch.Tensor, torch.Tensor]  # one layer's keys and values


class AttentionSpec(NamedTuple):
    """What an attention backend needs to know of a layer.

    Attributes:
        scale: applied to the scores.
        q_weight, k_weight: [head_dim], of the norms of queries and keys; both None without.
        eps: of these norms.
        kv_scales: [2, num_kv_heads] float32, of keys and values in an fp8 cache; None if the cache
            holds them as they are.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    eps: float
    kv_scales: torch.Tensor | None = None


class Backend(Protocol):
    """What computes attention: see `layers.attention_backends.AttentionBackend`."""

    def attend(
        self, qkv: "Product", spec: AttentionSpec, cache: LayerCache, context: "Context"
    ) -> torch.Tensor: ...


@dataclass
class Context:
    """One step's ragged batch, the cache that it reads and writes, and who computes attention.

    Attributes:
        backend: computes attention.
        kv_cache: of each layer keys and values, each [num_blocks, block_size, num_kv_heads,
            head_dim].
        cos_sin: [max positions, head_dim] float32, see `layers.rotary_embedding`.
        is_prefill: prefill rows bring any number of tokens each, decode rows exactly one.
        positions: [tokens] int32, the place of each token in its sequence.
        slot_mapping: [tokens] int32, where its key and value go; -1 for a padding row.
        context_lens: [rows] int32, tokens of each sequence up to and including this step.
        block_tables: [rows, width] int32; width 0 in decode steps of a backend that has metadata of
            its own in their place.
        cu_seqlens_q: [rows + 1] int32, prefill only: where each row's tokens begin.
        max_seqlen_q: the longest row's new tokens (1 in decode).
        max_context_len: no row's context is longer.
        metadata: what the backend prepared for the step.
        logits_indices: [any number], prefill only: the tokens whose logits are wanted, mostly each
            row's last; None wants them of all.
        output_indices: the tokens that go on after attention; None: all.
    """

    backend: Backend
    kv_cache: list[LayerCache]
    cos_sin: torch.Tensor
    is_prefill: bool
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    cu_seqlens_q: torch.Tensor
    max_seqlen_q: int
    max_context_len: int
    metadata: Any = None
    logits_indices: torch.Tensor | None = None
    output_indices: torch.Tensor | None = None

    def for_last_layer(self) -> "Context":
        """After the last layer only tokens whose logits are wanted are of use."""
        return replace(self, output_indices=self.logits_indices)
