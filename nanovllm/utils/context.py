"""What attention needs to know of a step, handed down the model as an argument."""

from dataclasses import dataclass

import torch


@dataclass
class Context:
    """One step's ragged batch, as seen by the attention layers.

    Attributes:
        cos_sin: [max positions, head_dim] float32, see `layers.rotary_embedding`.
        is_prefill: prefill rows bring any number of tokens each, decode rows exactly one.
        positions: [tokens] int32, the place of each token in its sequence.
        slot_mapping: [tokens] int32, where its key and value go; -1 for a padding row.
        context_lens: [rows] int32, tokens of each sequence up to and including this step.
        block_tables: [rows, width] int32.
        decode_plan: the tiles of the Triton backend's decode steps (`kernels.paged_decode`), in
            place of `block_tables`; None in all other steps.
        cu_seqlens_q: [rows + 1] int32, prefill only: where each row's tokens begin.
        logits_indices: [any number], prefill only: the tokens whose logits are wanted, mostly each
            row's last; None wants them of all.
        max_seqlen_q: the longest row's new tokens (1 in decode).
        max_context_len: no row's context is longer.
    """

    cos_sin: torch.Tensor
    is_prefill: bool
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    decode_plan: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    cu_seqlens_q: torch.Tensor
    logits_indices: torch.Tensor | None
    max_seqlen_q: int
    max_context_len: int
