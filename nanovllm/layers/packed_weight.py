"""Weights in the layout that oneDNN multiplies fastest on a CPU."""

from typing import Any

import torch


class OneDnnWeight:
    """A bf16 weight [out, in] in oneDNN's own blocked layout.

    The plain call reads the weight row by row, at half the bandwidth (measured on a 2-core AMD
    EPYC, one row: 15 against 23 GB/s; eight rows: 10 against 20). The packed form is

    - bf16 where the CPU has instructions for it: it replaces the weight;
    - else float32, and stands beside the weight, with which a single row is faster, as it has half
      the bytes (a decode step of Qwen3-0.6B on two cores: 92 against 114 ms; eight rows take a
      quarter of the time in float32, a prompt a seventh).

    Attributes:
        replaces_weight: whether it serves any number of rows, so that the plain matrix can go.
    """

    # oneDNN packs for a number of rows; 32 is within a few per cent of the best for 1 to 256.
    _ROWS = 32

    def __init__(self, weight: torch.Tensor) -> None:
        self.replaces_weight = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if not self.replaces_weight:
            weight = weight.float()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), self._ROWS)

    @staticmethod
    def serves(weight: torch.Tensor) -> bool:
        """Whether there is such a form of a weight."""
        return (
            weight.device.type == "cpu"
            and weight.dtype == torch.bfloat16
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        )

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b: [rows, in] -> [rows, out], in the dtype of x."""
        dtype = self._packed.dtype
        bias = None if bias is None else bias.to(dtype)
        linear: Any = torch.ops.mkldnn._linear_pointwise
        return linear(x.to(dtype), self._packed, bias, "none", [], "").to(x.dtype)

    def unpack(self) -> torch.Tensor:
        """[out, in]."""
        return self._packed.to_dense()
