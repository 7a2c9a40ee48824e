"""What both attention kernels know of the paged KV cache."""

LOG2_E = 1.4426950408889634  # exp(x) = 2 ** (x * LOG2_E)


def tile_tokens(block_size: int, limit: int = 64) -> int:
    """Tokens of a tile: the largest power of two that divides the block size, within limits."""
    return max(16, min(limit, block_size & -block_size))
