"""Tiles of the paged cache, and one sequence's share of it."""

import pytest
import torch

from nanovllm.kernels.paged_cache import gather, tile_tokens


@pytest.mark.parametrize(
    ("block_size", "tokens"),
    [(16, 16), (32, 32), (48, 16), (64, 64), (80, 16), (96, 32), (192, 64), (256, 64), (768, 64)],
)
def test_a_tile_lies_within_a_block(block_size: int, tokens: int):
    assert tile_tokens(block_size) == tokens
    assert block_size % tokens == 0


def test_tiles_may_be_limited():
    assert [tile_tokens(256, limit) for limit in (16, 32, 128)] == [16, 32, 128]


@pytest.mark.parametrize("context_len", [1, 3, 4, 5, 8, 11])
def test_gather_puts_the_blocks_of_a_sequence_together(context_len: int):
    block_size, table = 4, [5, 0, 3]
    cache = torch.arange(6 * block_size * 2 * 3).view(6, block_size, 2, 3)
    found = gather(cache, table, context_len)
    assert found.shape == (2, context_len, 3)
    for token in range(context_len):
        expected = cache[table[token // block_size], token % block_size]
        assert torch.equal(found[:, token], expected)
