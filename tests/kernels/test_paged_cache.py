"""Tiles of the paged cache."""

import pytest

from nanovllm.kernels.paged_cache import tile_tokens


@pytest.mark.parametrize(
    ("block_size", "tokens"),
    [(16, 16), (32, 32), (48, 16), (64, 64), (80, 16), (96, 32), (192, 64), (256, 64), (768, 64)],
)
def test_a_tile_lies_within_a_block(block_size: int, tokens: int):
    assert tile_tokens(block_size, 128) == tokens
    assert tile_tokens(block_size, 256) == min(tokens, 32), "within shared memory"
    assert block_size % tokens == 0


def test_tiles_may_be_limited():
    assert [tile_tokens(256, 128, limit) for limit in (16, 32, 128)] == [16, 32, 64]
