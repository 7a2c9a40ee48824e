"""The MLP's activation."""

import torch
from torch import nn

from nanovllm.kernels.silu_and_mul import silu_and_mul


class SiluAndMul(nn.Module):
    """[rows, 2 n] -> silu(first half) * second half, [rows, n]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return silu_and_mul(x)
