"""The best of the ranks' tokens is the token of the whole vocabulary."""

import pytest
import torch

from helpers.kernel_inputs import interpreted
from nanovllm.kernels.gumbel import gumbel_winners as winners_triton
from nanovllm.layers.sampler import NONE_LEFT, NOT_FINITE, gumbel_sample, gumbel_winners
from nanovllm.parallel.sampler import token_of_key, winner_keys
from nanovllm.parallel.sharding import vocab_part


def keys_torch(*args) -> torch.Tensor:
    return winner_keys(*gumbel_winners(*args))


@interpreted
@pytest.mark.parametrize("keys_of", [keys_torch, winners_triton])
@pytest.mark.parametrize("vocab_size", [300, 9000])
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("truncated", [False, True])
def test_winners_of_parts_give_the_tokens_of_all(keys_of, vocab_size, size, truncated) -> None:
    generator = torch.Generator().manual_seed(vocab_size + size)
    rows = 6
    logits = torch.randn(rows, vocab_size, generator=generator) * 3
    temperatures = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0, 1.0])
    seeds = torch.randint(2**62, (rows,), generator=generator)
    positions = torch.arange(rows, dtype=torch.int32) * 7
    logits[1] = float("-inf")  # it has no token to sample, nor has the next
    logits[2, -1] = logits[4, 0] = float("nan")
    thresholds = logits.topk(4).values[:, -1].contiguous() if truncated else None
    expected = torch.empty(rows, dtype=torch.int64)
    gumbel_sample(logits, temperatures, seeds, positions, expected, thresholds)
    keys = []
    for rank in range(size):
        part = vocab_part(vocab_size, rank, size)
        own = logits[:, part].contiguous()
        keys.append(keys_of(own, temperatures, seeds, positions, thresholds, part.start))
    assert token_of_key(torch.stack(keys).amax(dim=0)).tolist() == expected.tolist()


def test_keys_are_ordered_as_scores_and_then_by_token() -> None:
    inf = float("inf")
    pairs = [
        (-inf, NONE_LEFT),
        (-inf, 5),
        (-2.0, 1),
        (-1.5, 9),
        (-0.0, 8),
        (0.0, 7),
        (0.0, 0),
        (1e-30, 3),
        (2.5, 151935),
    ]
    pairs += [(2.5, 4), (inf, NOT_FINITE)]
    keys = winner_keys(torch.tensor([s for s, _ in pairs]), torch.tensor([t for _, t in pairs]))
    assert keys.tolist() == sorted(keys.tolist())
    assert token_of_key(keys).tolist() == [token for _, token in pairs]
    assert -1 not in keys  # it stands for nothing, in peer memory
