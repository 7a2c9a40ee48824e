"""Triton where it is installed, and a stand-in that lets kernel files import without it.

Programmatic dependent launch (PDL, from Hopper on) lets a kernel begin while the one before it in
the stream still runs. A kernel that takes part calls `launch_next` first, may then load what no
kernel of the step writes (weights, step inputs, keys and values of earlier steps), and calls
`wait_for_previous` before it touches anything else. A kernel boundary then costs about 1 us in
place of 2.5. Of every kernel with PDL at least one program must wait, or the order breaks for the
kernels after it.
"""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):
        raise ImportError("PDL does not compile")
    HAS_TRITON = True
except ImportError:  # not there, or too old
    HAS_TRITON = False
    TensorDescriptor: Any = None
    tl: Any = SimpleNamespace(constexpr=object)
    triton: Any = SimpleNamespace(jit=lambda function=None, **_: function or (lambda later: later))

__all__ = [
    "HAS_TRITON", "TensorDescriptor", "has_pdl", "launch_next", "pdl", "tl", "triton",
    "wait_for_previous",
]  # fmt: skip


def pdl(tensor: torch.Tensor) -> dict[str, bool]:
    """Launch options of a kernel with PDL, on or off as the device of `tensor` has it."""
    on = tensor.is_cuda and has_pdl(tensor.get_device())
    return {"PDL": on, "launch_pdl": on}


@lru_cache
def has_pdl(device_index: int) -> bool:
    """Whether a CUDA device knows PDL: Hopper or later."""
    return HAS_TRITON and torch.cuda.get_device_capability(device_index) >= (9, 0)


@triton.jit
def launch_next(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
