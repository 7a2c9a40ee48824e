"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467)."""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.layers.deferred import Normed, Stream
from nanovllm.utils.kernels import cpu_kernels_for, has_kernels, kernels

# On a CPU what is computed on the way should stay in its caches. Larger tensors come from the
# system each time, page by page: 900 rows of 1024 took 3.7 ms in place of 0.5.
ROWS_AT_A_TIME = 128


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension, of `size`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, stream: Stream) -> Normed:
        """The stream as a projection takes it, to be normalised then."""
        return Normed(self, stream)

    def normalize(
        self,
        x: torch.Tensor,
        partials: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`x` [tokens, size] normalised, the mean in float32; in `out` if that is given.

        `partials` [splits, tokens, size] are first added to `x`, in place.
        """
        if has_kernels(x):
            return kernels.rms_norm(x, self.weight, self.eps, partials, out)
        own = cpu_kernels_for(x.device, x.dtype) if partials is None else None
        if own is not None and x.numel() <= own.MAX_VALUES:
            y = own.rms_norm(x, self.weight, self.eps)
        else:
            y = rms_norm(x, self.weight, self.eps, partials)
        return y if out is None else out.copy_(y)

    def normalize_in_fp8(
        self, x: torch.Tensor, partials: torch.Tensor | None, group: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`normalize` by a kernel, with the result in fp8; see `kernels.fp8_rows`."""
        return kernels.rms_norm_in_fp8(x, self.weight, self.eps, partials, group)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, partials: torch.Tensor | None = None
) -> torch.Tensor:
    """The formula in torch; see `RMSNorm.normalize`."""
    if partials is not None:
        x.copy_(x.float() + partials.sum(dim=0, dtype=torch.float32))
    if len(x) <= ROWS_AT_A_TIME or not x.is_cpu:
        return F.rms_norm(x, weight.shape, weight, eps)
    pieces = x.split(ROWS_AT_A_TIME)
    return torch.cat([F.rms_norm(piece, weight.shape, weight, eps) for piece in pieces])
