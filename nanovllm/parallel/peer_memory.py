"""Memory of each GPU that the other ranks' kernels write to, shared through CUDA IPC.

A rank's buffer has three slots for each sender, used in turns; see `kernels.all_reduce`.
"""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from nanovllm.utils.kernels import kernels

_HANDLE_BYTES = 64  # CUipcMemHandle, in cuda.h
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class Peers(NamedTuple):
    """What a kernel needs to write to the other ranks' memory, and to read what they wrote.

    Attributes:
        rank, size: this one's number, and how many there are.
        dtype: of the elements.
        capacity: of a slot, in elements; a multiple of a program's block.
        buffers: [size] int64, the address of each rank's buffer [3 slots, size, capacity], as it is
            here. What no one has written is all ones, bit by bit.
        slots: [capacity / block] int32, which slot each program uses next.
        abort: [1] int32, on the host: if it is not 0, no kernel waits any more.
    """

    rank: int
    size: int
    dtype: torch.dtype
    capacity: int
    buffers: torch.Tensor
    slots: torch.Tensor
    abort: torch.Tensor

    @property
    def bits(self) -> torch.dtype:
        """The integers of the size of an element."""
        return _BITS[self.dtype.itemsize]


def connect_peers(
    store: dist.Store,
    rank: int,
    size: int,
    device: torch.device,
    sizes: list[tuple[torch.dtype, int]],
    least: Callable[[int], int],
) -> tuple[list[Peers], Callable[[], None]] | None:
    """Share buffers among all ranks; None, everywhere, if that is impossible anywhere.

    Args:
        store: by which ranks exchange handles.
        sizes: of each buffer the dtype, and the bytes of a slot.
        least: see `Group.least`.

    Returns:
        The peers of each buffer, and a function that gives the memory back.
    """
    found: list[Peers] = []
    mapping = Mapping()
    for number, (dtype, num_bytes) in enumerate(sizes):
        block = kernels.PUSH_BLOCK
        capacity = -(-num_bytes // (dtype.itemsize * block)) * block
        try:
            addresses = mapping.share(
                store, f"peers/{number}", rank, size, device,
                kernels.PUSH_SLOTS * size * capacity * dtype.itemsize,
            )  # fmt: skip
        except (OSError, RuntimeError):
            addresses = []
        if not least(bool(addresses)):  # and all have filled their buffers
            mapping.close()
            return None
        buffers = torch.tensor(addresses, dtype=torch.int64, device=device)
        slots = torch.zeros(capacity // block, dtype=torch.int32, device=device)
        abort = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        found.append(Peers(rank, size, dtype, capacity, buffers, slots, abort))
    return found, mapping.close


class Mapping:
    """Own memory, and that of others as it is mapped here. By the driver, in its current context:
    torch would map it for the device that owns it, with a context of its own there."""

    def __init__(self) -> None:
        self._own: list[ctypes.c_uint64] = []
        self._opened: list[ctypes.c_uint64] = []

    def share(
        self,
        store: dist.Store,
        key: str,
        rank: int,
        size: int,
        device: torch.device,
        num_bytes: int,
    ) -> list[int]:
        """Allocate a buffer, all its bits ones, and map those of the others: all addresses.

        Raises:
            OSError, RuntimeError: if the driver cannot. The others get an empty handle then.
        """
        handle = b""
        try:
            handle = self._allocate(num_bytes)
        finally:
            store.set(f"{key}/{rank}", handle.hex())
        addresses = [self._own[-1].value]
        for other in range(size):
            if other != rank:
                found = bytes.fromhex(store.get(f"{key}/{other}").decode())
                if len(found) != _HANDLE_BYTES:
                    raise RuntimeError(f"rank {other} has no memory to share")
                addresses.append(self._open(found))
        addresses.insert(rank, addresses.pop(0))
        torch.cuda.synchronize(device)
        return addresses

    @staticmethod
    def tensor(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Memory of this device as [num_bytes] int8."""
        return torch.as_tensor(_Array(address, num_bytes), device=device)

    def close(self) -> None:
        """Nothing may use the memory any more."""
        for function, addresses in (
            ("cuIpcCloseMemHandle", self._opened), ("cuMemFree_v2", self._own)
        ):  # fmt: skip
            for address in addresses:
                with suppress(RuntimeError):  # of a device that is lost
                    call_driver(function, address)
        self._own, self._opened = [], []

    def _allocate(self, num_bytes: int) -> bytes:
        address, handle = ctypes.c_uint64(), (ctypes.c_char * _HANDLE_BYTES)()
        call_driver("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        self._own.append(address)
        call_driver("cuMemsetD8_v2", address, ctypes.c_ubyte(255), ctypes.c_size_t(num_bytes))
        call_driver("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return handle.raw

    def _open(self, handle: bytes) -> int:
        address = ctypes.c_uint64()
        by_value = _Handle.from_buffer_copy(handle)
        call_driver("cuIpcOpenMemHandle_v2", ctypes.byref(address), by_value, _LAZY_PEER_ACCESS)
        self._opened.append(address)
        return address.value


class _Array:
    """Memory that torch can take as a tensor, by the CUDA array interface."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,), "typestr": "|i1", "data": (address, False), "version": 2,
        }  # fmt: skip


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * _HANDLE_BYTES)]


def call_driver(name: str, *args: Any) -> None:
    """Call a function of CUDA's driver.

    Raises:
        OSError: without such a driver.
        RuntimeError: if the call fails.
    """
    result = getattr(_driver(), name)(*args)
    if result != 0:
        raise RuntimeError(f"{name} returned error {result}")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
