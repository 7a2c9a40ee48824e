"""How kernels are launched: dependent launch, shared memory, and what a choice asks of a GPU.

Programmatic dependent launch (PDL, from Hopper on) lets a kernel begin while the one before it in
the stream still runs. A kernel that takes part calls `launch_dependents` first, may then load what
no kernel of the step writes (weights, step inputs, keys and values of earlier steps), and calls
`wait` before it touches anything else. A kernel boundary then costs about 1 us in place of 2.5. In
every kernel with PDL at least one program must wait, or the order breaks for the kernels after it.
"""

import ctypes
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Gpu(NamedTuple):
    """What the choice of a kernel or of its tiles asks of a GPU.

    Attributes:
        capability: compute capability, (9, 0) for Hopper.
        shared_memory: bytes that one program may have.
        shared_memory_of_sm: bytes that the programs of one multiprocessor share.
        num_sms: multiprocessors.
    """

    capability: tuple[int, int]
    shared_memory: int
    shared_memory_of_sm: int
    num_sms: int

    @property
    def has_pdl(self) -> bool:
        return self.capability >= (9, 0)

    @property
    def is_hopper(self) -> bool:
        return self.capability[0] == 9

    @property
    def is_hopper_class(self) -> bool:
        """Whether it has PDL and the shared memory of Hopper, for which some tiles are made: 228
        KiB a multiprocessor. Consumer cards have 100."""
        return self.has_pdl and self.shared_memory_of_sm >= 228 * 1024


@cache
def gpu_of(device_index: int) -> Gpu:
    """The facts of a CUDA device."""
    properties: Any = torch.cuda.get_device_properties(device_index)
    return Gpu(
        (properties.major, properties.minor),
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
        properties.multi_processor_count,
    )


def gpu_with(tensor: torch.Tensor) -> Gpu | None:
    """The facts of the GPU that holds a tensor; None on a CPU, as in Triton's interpreter."""
    return gpu_of(tensor.get_device()) if tensor.is_cuda else None


def pdl(tensor: torch.Tensor) -> dict[str, bool]:
    """Launch options of a kernel with PDL, on or off as the device of `tensor` has it."""
    gpu = gpu_with(tensor)
    on = gpu is not None and gpu.has_pdl
    return {"PDL": on, "launch_pdl": on}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, which kernels can call too, takes the host 3 us."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n`, which is positive. As for `cdiv`."""
    return 1 << (n - 1).bit_length()


def prefer_shared_memory(kernel: Any) -> None:
    """Let a kernel just launched divide a multiprocessor's memory as attention needs it, from its
    next launch on.

    One memory is both first-level cache and shared memory, and is divided anew only while nothing
    runs there. A kernel that needs no shared memory would turn it all into cache, and the next one,
    which does, could not start beside it.
    """
    if kernel is not None:  # None in Triton's interpreter
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
def launch_dependents(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
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
