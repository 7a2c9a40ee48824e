"""Weights and activations in fp8 (e4m3, Micikevicius et al. 2022, arXiv:2209.05433).

A number is stored as q, with a float32 scale s that a row, or a group of 128 of its numbers, has in
common: it stands for q * s. s is the least power of two with which the largest of them is at most
448. With any other s the numbers are as precise, as e4m3 is a floating-point format; but powers of
two round nothing, so that a number is the same whoever it shares a scale with: the parts of a row
on several GPUs are those of the whole row. (Below 2^-14 of the largest number e4m3 has fewer
digits, and there they may differ.)

Activations are quantised in every product, whatever kernel makes it and however many rows there
are: what a row is rounded to does not depend on its batch, but for two small things. Kernels that
add up in another order differ in a last bit, and of some 10^5 numbers one lies so near to the
border between two of e4m3 that this decides. And below 2^-14 of the largest number
`kernels.fp8_gemv`, which takes one or two rows, keeps digits that e4m3 does not have.

Products are added up in float32. In 16 bits the tensor cores' own sums on Hopper have fewer digits,
14 bits: of 128 products in the kernels here, of all of them in the library's. In float32 the
kernels widen both factors to float16, and sums are exact.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

FP8 = torch.float8_e4m3fn
GROUP = 128  # numbers with a scale of their own, in checkpoints that have scales of blocks
LARGEST = 448.0
_SMALLEST_SCALE = 2.0**-100  # of rows of zeros


class Fp8Weight(NamedTuple):
    """A weight W ~ values * scale.

    Attributes:
        values: [out, in] e4m3.
        scale: float32, one for each output, [out, 1]; or one for each output and `GROUP` inputs,
            [out, in / GROUP], where the inputs are grouped likewise. A kernel takes those of many
            outputs at once: they are side by side.

    It may be a stack of such weights: then both have a dimension in front.
    """

    values: torch.Tensor
    scale: torch.Tensor

    @property
    def has_groups(self) -> bool:
        return self.scale.shape[-1] > 1

    @property
    def group(self) -> int | None:
        """How many inputs have a scale in common; None: all."""
        return GROUP if self.has_groups else None

    @classmethod
    def parameters_like(
        cls, weight: torch.Tensor, group: int | None
    ) -> tuple[nn.Parameter, nn.Parameter]:
        """Memory for the two of a weight, or a stack, with a scale for each output, or with `group`
        for each output and so many inputs."""
        *stack, outputs, inputs = weight.shape
        shape = (*stack, num_groups(inputs, group), outputs)
        scale = torch.empty(shape, dtype=torch.float32, device=weight.device).mT
        values = torch.empty_like(weight, dtype=FP8)
        return nn.Parameter(values, requires_grad=False), nn.Parameter(scale, requires_grad=False)

    def at(self, index: int) -> "Fp8Weight":
        """One of a stack."""
        return Fp8Weight(self.values[index], self.scale[index])

    def dequantized(self) -> torch.Tensor:
        """[out, in] float32."""
        return dequantize(self.values, self.scale)


def stored_weight(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor | Fp8Weight:
    """A weight as kernels take it: with its scales, if it is in fp8."""
    return weight if scale is None else Fp8Weight(weight, scale)


def num_groups(in_features: int, group: int | None) -> int:
    """How many scales a row has."""
    return 1 if group is None else -(-in_features // group)


def quantize(x: torch.Tensor, group: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, n] as e4m3 [rows, n], and its scales [rows, 1] float32, or with `group` one for so
    many numbers, [rows, n / group]."""
    n = x.shape[1]
    pieces = _in_groups(x.float(), num_groups(n, group))
    largest = pieces.abs().amax(dim=-1) * (1 / LARGEST)
    bits = largest.clamp(min=_SMALLEST_SCALE).view(torch.int32)
    bits = (bits + 0x7FFFFF) & 0x7F800000  # the next power of two
    inverse = (0x7F000000 - bits).view(torch.float32)
    values = (pieces * inverse[..., None]).clamp(-LARGEST, LARGEST)
    return values.flatten(1)[:, :n].to(FP8), bits.view(torch.float32)


def dequantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[rows, n] float32, of what `quantize` returns."""
    pieces = _in_groups(values.float(), scale.shape[1])
    return (pieces * scale[..., None]).flatten(1)[:, : values.shape[1]]


def fp8_linear(
    x: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The formula in torch: x [rows, in] -> [rows, out], in the dtype of x."""
    rounded = dequantize(*quantize(x, weight.group))
    bias = None if bias is None else bias.float()
    return F.linear(rounded, weight.dequantized(), bias).to(x.dtype)


def _in_groups(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[rows, groups, n / groups], with zeros at the end of a last group that is not full."""
    if groups > 1:
        x = F.pad(x, (0, groups * GROUP - x.shape[1]))
    return x.unflatten(1, (groups, -1))
