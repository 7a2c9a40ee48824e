"""The gate of an MLP: activation(gate) * up (SwiGLU and others, Shazeer 2020, arXiv:2002.05202)."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.layers.deferred import Product
from nanovllm.utils.kernels import cpu_kernels_for

# By the names that config.json has for them.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class ActivationAndMul(nn.Module):
    """activation(gate) * up, gate and up being the halves of a product."""

    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        self.activation = activation

    def forward(self, gate_up: Product) -> torch.Tensor:
        """A product [tokens, 2 n], still to be made -> [tokens, n]."""
        return gate_up.gated(self.activation)


def activate_and_mul(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """[tokens, 2 n] -> [tokens, n], in torch, or for few tokens on a CPU in one loop."""
    own = cpu_kernels_for(gate_up.device, gate_up.dtype) if activation == "silu" else None
    if own is not None and gate_up.numel() <= own.MAX_VALUES:
        return own.silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate).mul_(up)
