"""What both attention kernels know of the paged KV cache."""

LOG2_E = 1.4426950408889634  # exp(x) = 2 ** (x * LOG2_E)
MAX_HEAD_DIM = 256


def tile_tokens(block_size: int, head_dim: int, limit: int = 64) -> int:
    """Tokens of a tile: the largest power of two that divides the block size, within limits.

    Tiles of 64 tokens and heads of 256 would take 138 to 224 KiB of shared memory; with 32 (and in
    prefill one stage less), all kernels fit into the 99 KiB that consumer GPUs give a program.
    """
    limit = min(limit, 64 if head_dim <= 128 else 32)
    return max(16, min(limit, block_size & -block_size))
