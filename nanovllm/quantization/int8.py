"""Weights and activations in int8 on a CPU, multiplied by oneDNN, which comes with torch.

A weight has a scale for each output, with which the largest number of its row becomes 127; so has
an input for each token. Products of integers are added up exactly, so a row's result depends on no
other row. Half the bytes of bf16, and twice the numbers an instruction.
"""

from typing import Any

import torch
from torch import nn

from nanovllm.layers.linear import Linear
from nanovllm.layers.moe import SparseMoE

_LARGEST = 127
_ZERO = 128  # inputs are unsigned: this one stands for 0
_SMALLEST = 1e-30  # of rows of zeros


class Int8Weight:
    """A weight in int8; see `layers.packed_weight.PackedWeight`.

    Args:
        weight: [out, in], in any floating-point dtype.
    """

    replaces_weight = True

    def __init__(self, weight: torch.Tensor) -> None:
        self._dtype = weight.dtype
        weight = weight.detach().float().contiguous()
        self._scale = weight.abs().amax(dim=1).clamp(min=_SMALLEST) / _LARGEST
        values = (weight / self._scale[:, None]).round().to(torch.int8)
        self._zeros = torch.zeros(len(values), dtype=torch.int64)
        self._packed = torch.ops.onednn.qlinear_prepack(values, None)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        values = x.float()
        scale = values.abs().amax(dim=1, keepdim=True).clamp_(min=_SMALLEST).div_(_LARGEST)
        values = (values / scale).round_().add_(_ZERO).to(torch.uint8)
        linear: Any = torch.ops.onednn.qlinear_pointwise
        y = linear(
            values, 1.0, _ZERO, self._packed, self._scale, self._zeros, None,
            1.0, 0, torch.float32, "none", [], "",
        ).mul_(scale)  # fmt: skip
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    def unpack(self) -> torch.Tensor:
        """In the dtype that it came in: what a checkpoint has is rounded to that first, as it was
        the first time. Of the result the same integers are made again."""
        return (self._packed.to_dense().t().contiguous() * self._scale[:, None]).to(self._dtype)


def check_int8(model: nn.Module, device: torch.device) -> None:
    """Raises:
    ValueError: if weights in int8 do not serve a model, or a device.
    """
    if device.type != "cpu":
        raise ValueError(
            f"quantization='int8' is for CPUs, and device is {str(device)!r}: there, give 'fp8'"
        )
    # Without VNNI, sums of two products are cut off at 16 bits.
    if not (torch.backends.mkldnn.is_available() and _has_vnni()):
        raise ValueError(
            "quantization='int8' needs an x86 CPU with VNNI instructions (Cascade Lake, Zen 4 or "
            "later): leave it out"
        )
    for name, module in model.named_modules():
        if isinstance(module, SparseMoE):
            raise ValueError("quantization='int8' does not serve mixtures of experts: leave it out")
        if isinstance(module, Linear) and module.weight_scale is not None:
            raise ValueError(f"quantization='int8', but {name} is in fp8 in the checkpoint already")


def _has_vnni() -> bool:
    return bool(torch.cpu._is_vnni_supported())
