"""One sequence's share of the paged cache; the rest is tested beside the kernels."""

import pytest
import torch

from nanovllm.layers import paged_attention
from nanovllm.layers.paged_attention import _gather, prefill_attention


@pytest.mark.parametrize("context_len", [1, 3, 4, 5, 8, 11])
def test_gather_puts_the_blocks_of_a_sequence_together(context_len: int):
    block_size, table = 4, [5, 0, 3]
    cache = torch.arange(6 * block_size * 2 * 3).view(6, block_size, 2, 3)
    found = _gather(cache, table, context_len)
    assert found.shape == (2, context_len, 3)
    for token in range(context_len):
        expected = cache[table[token // block_size], token % block_size]
        assert torch.equal(found[:, token], expected)


@pytest.mark.parametrize("mask_values", [1, 50, 100])
def test_queries_by_the_piece_attend_as_all_at_once(
    monkeypatch: pytest.MonkeyPatch, mask_values: int
):
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 10, 4, 2, 8, generator=generator)
    lengths, contexts = torch.tensor([7, 1, 0, 5, 9]), torch.tensor([17, 6, 0, 5, 20])
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    queries = torch.randn(int(lengths.sum()), 4, 8, generator=generator)
    tables = torch.stack([torch.randperm(10, generator=generator)[:5] for _ in lengths])
    args = (queries, keys, values, starts, contexts, tables, 0.3)
    expected = prefill_attention(*args)
    monkeypatch.setattr(paged_attention, "_MASK_VALUES", mask_values)
    torch.testing.assert_close(prefill_attention(*args), expected)
