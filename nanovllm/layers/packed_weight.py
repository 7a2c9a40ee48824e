"""How a CPU multiplies bf16 weights fastest: oneDNN's own layout for several rows, torch's own
product for a single one."""

import threading
from typing import Any

import torch
import torch.nn.functional as F

_one_at_a_time = threading.Lock()


class OneDnnWeight:
    """A bf16 weight [out, in] in oneDNN's own blocked layout, for products of several rows.

    The plain call would have oneDNN read the weight row by row, at half the bandwidth (measured on
    a 2-core AMD EPYC, eight rows: 10 against 20 GB/s). The packed form is

    - bf16 where the CPU has instructions for it;
    - else float32 (a decode step of eight rows takes a quarter of the time, a prompt a seventh).

    Attributes:
        can_replace_weight: whether it takes no more memory than the plain matrix, which can go
            then. A single row is slower without it: see `one_row_product`.
    """

    # oneDNN packs for a number of rows; 32 is within a few per cent of the best for 1 to 256.
    _ROWS = 32

    def __init__(self, weight: torch.Tensor) -> None:
        self.can_replace_weight = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if not self.can_replace_weight:
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


def one_row_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + b of one row: [1, in] -> [1, out], on a CPU in bf16.

    By torch's own matrix-vector product, which reads the weight as fast as a plain sum does (2-core
    AMD EPYC: 34 of 35 GB/s; oneDNN reads 19, and its packed layout 25). torch takes it only while
    oneDNN is switched off, which is a switch of the process: what another thread computes in that
    moment is right, too.
    """
    onednn: Any = torch.backends.mkldnn
    # Alone: another thread would take the switch, as it is now, for the program's own choice.
    with _one_at_a_time:
        was_on, onednn.enabled = onednn.enabled, False
        try:
            return F.linear(x, weight, bias)
        finally:
            onednn.enabled = was_on
