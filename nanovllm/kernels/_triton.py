"""Triton where it is installed, and a stand-in that lets kernel files import without it.

Programmatic dependent launch (PDL, from Hopper on) lets a kernel begin while the one before it in
the stream still runs. A kernel that takes part calls `launch_next` first, may then load what no
kernel of the step writes (weights, step inputs, keys and values of earlier steps), and calls
`wait_for_previous` before it touches anything else. A kernel boundary then costs about 1 us in
place of 2.5. Of every kernel with PDL at least one program must wait, or the order breaks for the
kernels after it.
"""

import ctypes
from contextlib import suppress
from functools import cache, lru_cache
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
    "HAS_TRITON", "TensorDescriptor", "has_large_shared_memory", "launch_next", "pdl",
    "prefer_shared_memory", "prefetch", "tl", "triton", "wait_for_previous",
]  # fmt: skip


def pdl(tensor: torch.Tensor) -> dict[str, bool]:
    """Launch options of a kernel with PDL, on or off as the device of `tensor` has it."""
    on = tensor.is_cuda and has_pdl(tensor.get_device())
    return {"PDL": on, "launch_pdl": on}


@lru_cache
def has_pdl(device_index: int) -> bool:
    """Whether a CUDA device knows PDL: Hopper or later."""
    return HAS_TRITON and torch.cuda.get_device_capability(device_index) >= (9, 0)


def has_large_shared_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on a GPU with PDL and with the shared memory of Hopper, for which some
    tiles are made: 228 KiB a multiprocessor. Consumer cards have 100."""
    if not tensor.is_cuda or not has_pdl(tensor.get_device()):
        return False
    properties = torch.cuda.get_device_properties(tensor.device)
    return properties.shared_memory_per_multiprocessor >= 228 * 1024


def prefer_shared_memory(kernel: Any) -> None:
    """Let a kernel just launched divide a multiprocessor's memory as attention needs it, from its
    next launch on.

    One memory is both first-level cache and shared memory, and is divided anew only while nothing
    runs there. A kernel that needs no shared memory would turn it all into cache, and the next one,
    which does, could not start beside it.
    """
    if kernel is not None:  # with Triton's interpreter
        _carve_out(kernel.function)


@cache
def _carve_out(function: int) -> None:
    preferred_shared_memory_carveout, percent = 9, 100  # CUfunction_attribute, in cuda.h
    with suppress(OSError):  # a driver of another name: it is only a hint
        driver = ctypes.CDLL("libcuda.so.1")
        driver.cuFuncSetAttribute(
            ctypes.c_void_p(function), preferred_shared_memory_carveout, percent
        )


@triton.jit
def launch_next(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(addresses, num_bytes: tl.constexpr, PDL: tl.constexpr):
    """Have bytes at each address fetched into the second-level cache; both multiples of 16."""
    if PDL:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
            [addresses, num_bytes], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
