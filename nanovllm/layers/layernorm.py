"""The residual stream, and RMSNorm."""

from dataclasses import dataclass

import torch
from torch import nn

from nanovllm.kernels.rms_norm import rms_norm


@dataclass
class Residual:
    """The residual stream, to which each sub-layer adds its output.

    `x` is [tokens, hidden]. `partials` [splits, tokens, hidden] float32, if any, have still to
    be added: the norm that comes next does it on the way.
    """

    x: torch.Tensor
    partials: torch.Tensor | None = None

    def rows(self, index: torch.Tensor | slice) -> "Residual":
        """Some of the tokens, added up."""
        x = self.x[index]
        if self.partials is not None:
            x = (x.float() + self.partials[:, index].sum(dim=0)).to(x.dtype)
        return Residual(x)

    def keep(self, tokens: torch.Tensor) -> None:
        """Go on with some of the tokens. To be called after a norm, when nothing is left to add: so
        few may go to a kernel that knows no partial sums."""
        assert self.partials is None
        self.x = self.x[tokens]


class RMSNorm(nn.Module):
    """Normalises the last dimension, `size`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, residual: Residual) -> torch.Tensor:
        partials, residual.partials = residual.partials, None
        return rms_norm(residual.x, self.weight, self.eps, partials)
