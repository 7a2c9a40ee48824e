"""The noise that sampling adds to the logits."""

import torch

from nanovllm.kernels.gumbel import TILE
from nanovllm.layers.sampler import gumbel_noise


def noise_of_tokens(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    """[vocab_size] float32, by the numbers that `gumbel_sample`'s twin draws."""
    tiles = -(-vocab_size // TILE)
    counters = torch.arange(tiles * TILE // 4)
    noise = gumbel_noise(torch.tensor(seed), torch.tensor(position), counters)
    return noise.view(4, tiles, -1).transpose(0, 1).flatten()[:vocab_size]
