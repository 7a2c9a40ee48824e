"""RMSNorm."""

import torch
from torch import nn

from nanovllm.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Normalises the last dimension of x [rows, size]. Linear layers take one as their `norm`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)
