"""One sequence's share of the paged cache; the rest is tested beside the kernels."""

import pytest
import torch

from nanovllm.layers.paged_attention import _gather


@pytest.mark.parametrize("context_len", [1, 3, 4, 5, 8, 11])
def test_gather_puts_the_blocks_of_a_sequence_together(context_len: int):
    block_size, table = 4, [5, 0, 3]
    cache = torch.arange(6 * block_size * 2 * 3).view(6, block_size, 2, 3)
    found = _gather(cache, table, context_len)
    assert found.shape == (2, context_len, 3)
    for token in range(context_len):
        expected = cache[table[token // block_size], token % block_size]
        assert torch.equal(found[:, token], expected)
