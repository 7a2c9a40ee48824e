"""Large summands put side by side on each GPU by the copy engines, while the next are computed.

A prefill step's sums are bound by the link, and kernels that move data take multiprocessors from
the products beside them. So a product is made in pieces of its rows, straight into memory where
it stands beside those of the other ranks; a piece travels while the next is computed, and the norm
that comes next adds them all up on its way. Each GPU sends all of its summand to each other one:
with two that is what any all-reduce sends, with more it is more.
"""

import ctypes
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from nanovllm.layers.deferred import Norm
from nanovllm.parallel.peer_memory import Mapping, Peers, call_driver
from nanovllm.utils.kernels import kernels

_MOST_PIECES, _LEAST_ROWS = 4, 512
_FLAG_BYTES = 1024  # at the end of the memory: one int32 for each sender


class PartCopies:
    """Two buffers, used in turns. The others write to one of them when they have heard from this
    rank that it has read the one before.

    Args:
        store: by which ranks exchange handles.
        peers: of the dtype of the summands.
        device: of this rank.
        capacity: elements of the largest summand.

    Raises:
        OSError, RuntimeError: if the GPUs do not reach each other's memory.
    """

    def __init__(
        self, store: dist.Store, peers: Peers, device: torch.device, capacity: int
    ) -> None:
        self.capacity = capacity
        self._peers, rank, size = peers, peers.rank, peers.size
        self._mapping = Mapping()
        self._buffer_bytes = size * capacity * peers.dtype.itemsize
        num_bytes = 2 * self._buffer_bytes + _FLAG_BYTES
        self._addresses = self._mapping.share(store, "parts", rank, size, device, num_bytes)
        memory = self._mapping.tensor(self._addresses[rank], num_bytes, device)
        self._buffers = memory[: 2 * self._buffer_bytes].view(peers.dtype).view(2, -1)
        self._flags = memory[2 * self._buffer_bytes :].view(torch.int32)
        self._flags.zero_()
        torch.cuda.synchronize(device)
        self._stream = torch.cuda.Stream(device)
        self._calls = 0

    def send(
        self,
        rows: int,
        n: int,
        make: Callable[[slice, torch.Tensor], object],
        pieces_at_most: int = _MOST_PIECES,
    ) -> "ArrivingParts":
        """Compute this rank's summand [rows, n], and send it to the others.

        Args:
            make: computes some rows of it, into the memory given.

        Returns:
            The summands of all ranks, [size, rows, n], which hold until the next call but one, and
            must be used before the next call.
        """
        rank, size = self._peers.rank, self._peers.size
        buffer = self._buffers[self._calls % 2]
        self._calls += 1
        parts = buffer[: size * rows * n].view(size, rows, n)
        step = -(-rows // max(1, min(pieces_at_most, rows // _LEAST_ROWS)))
        pieces = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
        for number, piece in enumerate(pieces):
            own = parts[rank, piece]
            make(piece, own)
            self._stream.wait_stream(torch.cuda.current_stream())
            for other in range(size):
                if other != rank:
                    self._copy(own, other)
                    self._set_flag(other, self._number(number))
        return ArrivingParts(self, parts, pieces, self._number(0))

    def wait(self, number: int) -> None:
        """Let the current stream wait for the piece of a number, from all ranks."""
        kernels.wait_for(self._flags, number, self._peers)

    def close(self) -> None:
        del self._buffers, self._flags
        self._mapping.close()

    def _copy(self, own: torch.Tensor, other: int) -> None:
        """Copy memory of this rank to the same place in that of another."""
        offset = own.data_ptr() - self._addresses[self._peers.rank]
        call_driver(
            "cuMemcpyAsync", ctypes.c_uint64(self._addresses[other] + offset),
            ctypes.c_uint64(own.data_ptr()), ctypes.c_size_t(own.numel() * own.element_size()),
            ctypes.c_void_p(self._stream.cuda_stream),
        )  # fmt: skip

    def _set_flag(self, other: int, number: int) -> None:
        """Tell another rank, after what was copied to it before, the number of the last piece."""
        address = self._addresses[other] + 2 * self._buffer_bytes + 4 * self._peers.rank
        call_driver(
            "cuStreamWriteValue32_v2", ctypes.c_void_p(self._stream.cuda_stream),
            ctypes.c_uint64(address), ctypes.c_uint32(number), ctypes.c_uint(0),
        )  # fmt: skip

    def _number(self, piece: int) -> int:
        """Of a piece of this call, among those of all calls, as an int32."""
        return (self._calls * _MOST_PIECES + piece + 2**31) % 2**32 - 2**31


class ArrivingParts:
    """The summands of all ranks; see `layers.deferred.PendingSum`."""

    def __init__(
        self, copies: PartCopies, parts: torch.Tensor, pieces: list[slice], first_number: int
    ) -> None:
        self.parts = parts  # [size, tokens, hidden]
        self.num_pieces = len(pieces)
        self._copies, self._pieces, self._first_number = copies, pieces, first_number

    def add_to(self, x: torch.Tensor) -> None:
        for tokens in self._arrivals():
            piece = x[tokens]
            piece.copy_(piece.float() + self.parts[:, tokens].sum(dim=0, dtype=torch.float32))

    def add_and_normalize(self, x: torch.Tensor, norm: Norm, out: torch.Tensor) -> Iterator[slice]:
        for tokens in self._arrivals():
            norm.normalize(x[tokens], self.parts[:, tokens], out[tokens])
            yield tokens

    def _arrivals(self) -> Iterator[slice]:
        """The tokens that are there, in two halves: small pieces come early, but what is made of
        large ones takes fewer kernels."""
        middle = len(self._pieces) // 2
        for half in (self._pieces[:middle], self._pieces[middle:]):
            if half:
                self._copies.wait(self._first_number + self._pieces.index(half[-1]))
                yield slice(half[0].start, half[-1].stop)
