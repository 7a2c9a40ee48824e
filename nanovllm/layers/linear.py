"""Linear layers between two states of the residual stream: out of it through a norm, or back in.

On a GPU one row, and of small matrices two, are the business of `kernels.gemv`, which does all in
one kernel, up to 128 (of some large matrices 64) that of `kernels.split_k`, and 129 to 256 that of
`kernels.tiled_gemm` if the matrix is small. The rest is a library's. What goes back in as partial
sums comes out through a norm, which adds them up.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.kernels.gemv import can_gemv, gemv_triton
from nanovllm.kernels.silu_and_mul import silu_and_mul
from nanovllm.kernels.split_k import can_split_k, num_splits, split_k_triton
from nanovllm.kernels.tiled_gemm import SPLITS, can_tile, tiled_gemm_triton
from nanovllm.layers.layernorm import Residual, RMSNorm

# oneDNN packs a weight for a number of rows; 32 is within a few per cent of the best for 1 to 256.
_PACK_ROWS = 32


class Linear(nn.Module):
    """y = x W^T + b. On a CPU, `pack` lets oneDNN keep a bf16 weight in its own blocked layout.

    The plain call re-reads the weight in row order, at half the bandwidth (measured on a 2-core
    AMD EPYC, one row: 15 against 23 GB/s; eight rows: 10 against 20).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._packed_weight: torch.Tensor | None = None

    def forward(self, residual: Residual, norm: RMSNorm) -> torch.Tensor:
        """W norm(x) + b: [tokens, out]."""
        if self._goes_to_gemv(residual):
            return gemv_triton(residual.x, self.weight, self.bias, norm.weight, norm.eps)
        return self._product(norm(residual))

    def add_to(self, residual: Residual, x: torch.Tensor) -> None:
        """W x + b, for x [tokens, in], added to the residual stream."""
        if can_gemv(x, self.weight, has_norm=False):
            gemv_triton(x, self.weight, self.bias, add_to=residual.x)
        elif self.bias is None and can_split_k(x, self.out_features, in_parts=True):
            residual.partials = split_k_triton(x, self.weight, num_splits(self.out_features))
        elif self.bias is None and can_tile(x, self.out_features):
            residual.partials = tiled_gemm_triton(x, self.weight, SPLITS)
        elif self.bias is None and x.is_cuda:
            residual.x.addmm_(x, self.weight.t())  # the add is the product's epilogue
        else:
            residual.x.add_(self._product(x))

    def _goes_to_gemv(self, residual: Residual) -> bool:
        """Whether `kernels.gemv` is to make W norm(x): it adds no partial sums up."""
        return residual.partials is None and can_gemv(residual.x, self.weight, has_norm=True)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed_weight is not None and (self.weight is None or x.shape[0] > 1):
            return packed_linear(x, self._packed_weight, self.bias)
        if self.bias is None and can_split_k(x, self.out_features):
            return split_k_triton(x, self.weight)
        if self.bias is None and can_tile(x, self.out_features):
            return tiled_gemm_triton(x, self.weight)
        return F.linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Replace the weight by its packed form. Call once, after loading.

        A packed form in float32 stands beside the weight: one row is faster with half the bytes
        (measured, a decode step of Qwen3-0.6B on two cores: 92 against 114 ms).
        """
        self._packed_weight = pack_weight(self.weight)
        if self._packed_weight.dtype == self.weight.dtype:
            self.weight = None


class PackedLinear(Linear):
    """Several projections of the same input, in one matrix: q/k/v, or gate/up.

    `parts` maps each projection's name in the checkpoint to its number of output features.
    """

    def __init__(self, in_features: int, parts: dict[str, int], bias: bool = False) -> None:
        super().__init__(in_features, sum(parts.values()), bias)
        self.parts = parts

    def checkpoint_views(self) -> dict[str, torch.Tensor]:
        """Views of the parameters, by the names that their parts have in the checkpoint."""
        views = {}
        for kind, parameter in self.named_parameters():
            pieces = parameter.data.split(list(self.parts.values()))
            views.update({f"{name}.{kind}": piece for name, piece in zip(self.parts, pieces)})
        return views


class GatedLinear(PackedLinear):
    """silu(W_gate x) * (W_up x), the first half of the MLP; its two parts are equally wide."""

    def forward(self, residual: Residual, norm: RMSNorm) -> torch.Tensor:
        if self._goes_to_gemv(residual):
            return gemv_triton(
                residual.x, self.weight, norm_weight=norm.weight, eps=norm.eps, gated=True
            )
        x = norm(residual)
        if can_split_k(x, self.out_features):
            return split_k_triton(x, self.weight, gated=True)
        if can_tile(x, self.out_features):
            return tiled_gemm_triton(x, self.weight, gated=True)
        return silu_and_mul(self._product(x))


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN's packed matrices serve this weight: bf16, on a CPU."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] in oneDNN's blocked layout, for `packed_linear` only.

    It is float32 where the CPU has no bf16 instructions; measured on such a 2-core AMD EPYC, that
    takes a quarter of the time for eight rows and a seventh for a prompt.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        weight = weight.float()
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACK_ROWS)


def packed_linear(
    x: torch.Tensor, packed_weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [rows, in] times a weight from `pack_weight`: [rows, out], in the dtype of x."""
    dtype = packed_weight.dtype
    bias = None if bias is None else bias.to(dtype)
    y = torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed_weight, bias, "none", [], "")
    return y.to(x.dtype)
