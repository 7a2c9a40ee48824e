"""What both attention kernels know of the paged KV cache."""

import torch

LOG2_E = 1.4426950408889634  # exp(x) = 2 ** (x * LOG2_E)


def tile_tokens(block_size: int, limit: int = 64) -> int:
    """Tokens of a tile: the largest power of two that divides the block size, within limits."""
    return max(16, min(limit, block_size & -block_size))


def gather(cache: torch.Tensor, block_table: list[int], context_len: int) -> torch.Tensor:
    """One sequence's keys or values: [num_kv_heads, context_len, head_dim]."""
    num_blocks = -(-context_len // cache.shape[1])
    if num_blocks == 1:
        tokens = cache[block_table[0], :context_len]
    else:
        tokens = cache[block_table[:num_blocks]].flatten(0, 1)[:context_len]
    return tokens.transpose(0, 1)
