"""RMSNorm, with the residual add that precedes it."""

import torch
from torch import nn

from nanovllm.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """`forward(x)` normalises; `forward(x, residual)` first adds `x` into `residual`, in place."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, residual)
