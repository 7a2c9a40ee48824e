"""The Triton kernels, where they can be imported: the one place that asks."""

from typing import Any

import torch

kernels: Any
try:
    from nanovllm import kernels
except ImportError:  # no Triton, or an old one: layers compute in plain torch
    kernels = None


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether kernels can work on a tensor: it is on a GPU, and they are there."""
    return kernels is not None and tensor.is_cuda
