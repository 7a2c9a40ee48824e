"""Weights and activations in int8 on a CPU, multiplied by oneDNN, which comes with torch.

A weight has a scale for each output, with which the largest number of its row becomes 127; so has
an input for each token. Products of integers are added up exactly, so a row's result depends on no
other row. Half the bytes of bf16, and twice the numbers an instruction. Of several ranks each has
scales for its own part of a row, so their tokens may be others than those of one.
"""

from typing import Any

import torch
from torch import nn

from nanovllm.layers.linear import Linear
from nanovllm.layers.moe import SparseMoE

_LARGEST = 127
_ZERO = 128  # inputs are unsigned: this one stands for 0
_SMALLEST = 1e-30  # of rows of zeros
_PIECE = 2**22  # elements of a weight that are in float32 at once


class Int8Weight:
    """A weight in int8; see `layers.packed_weight.PackedWeight`.

    Args:
        weight: [out, in], in any floating-point dtype.
    """

    replaces_weight = True

    def __init__(self, weight: torch.Tensor) -> None:
        self._dtype, device = weight.dtype, weight.device
        self._scale = torch.empty(len(weight), dtype=torch.float32, device=device)
        values = torch.empty(weight.shape, dtype=torch.int8, device=device)
        step = max(1, _PIECE // weight.shape[1])
        weight = weight.detach()
        pieces = zip(weight.split(step), self._scale.split(step), values.split(step), strict=True)
        for rows, own_scale, own_values in pieces:
            rows = rows.float()
            own_scale.copy_(rows.abs().amax(dim=1).clamp_(min=_SMALLEST).div_(_LARGEST))
            own_values.copy_((rows / own_scale[:, None]).round_())
        self._zeros = torch.zeros(len(values), dtype=torch.int64, device=device)
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
        values = self._packed.to_dense().t()
        weight = torch.empty(values.shape, dtype=self._dtype, device=values.device)
        step = max(1, _PIECE // values.shape[1])
        pieces = zip(weight.split(step), values.split(step), self._scale.split(step), strict=True)
        for rows, own_values, own_scale in pieces:
            rows.copy_(own_values * own_scale[:, None])
        return weight


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
