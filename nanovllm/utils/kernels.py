"""The kernels, where they can be imported: the one place that asks."""

import os
from functools import cache
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


def cpu_kernels_for(device: torch.device, dtype: torch.dtype) -> Any:
    """`layers.cpu_kernels`, or None if they cannot work on such tensors or without numba, and in a
    process that was forked from one with numba's threads: numba would end it."""
    if device.type != "cpu" or (found := _import_cpu_kernels()) is None:
        return None
    return found if dtype in found.DTYPES and os.getpid() == found.PROCESS_ID else None


@cache
def _import_cpu_kernels() -> Any:
    """When first asked for, as it takes half a second."""
    try:
        from nanovllm.layers import cpu_kernels
    except ImportError:
        return None
    return cpu_kernels
