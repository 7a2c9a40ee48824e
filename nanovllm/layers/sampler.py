"""From logits to the next token."""

import torch
from torch import nn

from nanovllm.kernels.gumbel_sample import gumbel_sample


class Sampler(nn.Module):
    """Greedy and random rows side by side; see `nanovllm.kernels.gumbel_sample`."""

    def forward(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
        copies: torch.Tensor,
        turn: torch.Tensor,
    ) -> None:
        gumbel_sample(logits, temperatures, seeds, positions, out, copies, turn)
