"""Sums over GPUs that write to each other's memory, and the best of their sampled tokens.

    stream += sum over the ranks of their summands
    token of a row = the token of the largest of the ranks' keys

A small sum takes as long as its messages travel, so there is one message to each other rank and no
answer. Every rank has a slot for each sender. A program writes its block of the summand to its slot
on each other GPU, and then reads its own slots until all is there: what no one has written yet is
all ones, bit by bit, a NaN that is never sent. A program goes round three slots: while it uses one,
it refills with ones the one that it used last, which the others write to two calls later, when they
have heard from it that this call has ended. The next slot of a program is in memory, so that in a
CUDA Graph too each call has its own. All ranks add in the order of ranks, in float32, so they all
get the same bits; a summand is rounded to the dtype of the stream before, as it travels.

All ranks must make the same calls in the same order. When a rank is gone, `abort`, in host memory,
lets the others go on, with garbage.

Grid: one program for each block of 1024 elements. Bytes moved: the summand over the link to each
other GPU; locally summands and slots read, a slot filled, the stream read and written. Bound by the
latency of the link (some 2 us), then by its bandwidth.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl

from nanovllm.kernels.launch import cdiv, launch_dependents, pdl, wait

BLOCK = 1024
SLOTS = 3
_LOOK_EVERY = 1024  # readings of a slot for each one of `abort`


class Peers(Protocol):
    """See `parallel.peer_memory.Peers`."""

    rank: int
    size: int
    capacity: int
    bits: torch.dtype
    buffers: torch.Tensor
    slots: torch.Tensor
    abort: torch.Tensor


def all_reduce_add(stream: torch.Tensor, summands: torch.Tensor, peers: Peers) -> None:
    """Add the sum over the ranks of their summands to `stream`, which is the same everywhere.

    Args:
        stream: [rows, n], at most `peers.capacity` elements, of the dtype of the peers.
        summands: [rows, n], or [splits, rows, n], of which the sum is meant.
    """
    _launch(stream, summands, peers, has_stream=True)


def all_reduce(x: torch.Tensor, peers: Peers) -> None:
    """The sum over the ranks of `x`, in place; see `all_reduce_add`."""
    _launch(x, x, peers, has_stream=False)


def best_of_ranks(
    keys: torch.Tensor,
    peers: Peers | None,
    out: torch.Tensor,
    host_tokens: torch.Tensor,
    buffer_index: torch.Tensor,
) -> None:
    """The tokens of the largest keys, into `out` [rows] int64.

    Args:
        keys: [rows] int64, see `kernels.gumbel_winners`.
        peers: of int64; None if the keys are the largest already.
        host_tokens: [buffers, rows or more] int64, written too: pinned host memory.
        buffer_index: [1] int32, the row of `host_tokens` that is written.
    """
    rows = keys.shape[0]
    _best_of_ranks_kernel[(cdiv(rows, BLOCK),)](
        keys, *(_NO_PEERS if peers is None else _arguments(peers)), out, host_tokens, buffer_index,
        rows, host_tokens.shape[1], RANK=0 if peers is None else peers.rank,
        SIZE=1 if peers is None else peers.size, BLOCK=BLOCK, LOOK_EVERY=_LOOK_EVERY, num_warps=8,
        **pdl(keys),
    )  # fmt: skip


def wait_for(flags: torch.Tensor, number: int, peers: Peers) -> None:
    """Let the stream wait until the flags of all other ranks have reached a number.

    Args:
        flags: [size] int32, which the other ranks write, each its own. They only grow, modulo 2^32.
    """
    _wait_kernel[(1,)](
        flags, number, peers.abort, RANK=peers.rank, SIZE=peers.size, LOOK_EVERY=_LOOK_EVERY,
        num_warps=1,
    )  # fmt: skip


_NO_PEERS = (None, None, None, 0)


def _arguments(peers: Peers) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    return peers.buffers, peers.slots, peers.abort, peers.capacity


def _launch(stream: torch.Tensor, summands: torch.Tensor, peers: Peers, has_stream: bool) -> None:
    num_elements = stream.numel()
    assert num_elements <= peers.capacity and stream.element_size() == peers.bits.itemsize
    _all_reduce_kernel[(cdiv(num_elements, BLOCK),)](
        stream, summands, *_arguments(peers), num_elements,
        SPLITS=summands.numel() // num_elements, HAS_STREAM=has_stream, RANK=peers.rank,
        SIZE=peers.size, BITS=8 * stream.element_size(), BLOCK=BLOCK, LOOK_EVERY=_LOOK_EVERY,
        num_warps=4, **pdl(stream),
    )  # fmt: skip


@triton.jit
def _all_reduce_kernel(
    stream_ptr, summands_ptr, buffers_ptr, slots_ptr, abort_ptr, capacity, num_elements,
    SPLITS: tl.constexpr, HAS_STREAM: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr, LOOK_EVERY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    INT: tl.constexpr = tl.core.get_int_dtype(BITS, True)
    dtype: tl.constexpr = stream_ptr.dtype.element_ty
    launch_dependents(PDL)
    first = tl.program_id(0) * BLOCK
    cells = first + tl.arange(0, BLOCK)
    mask = cells < num_elements
    wait(PDL)
    slot = tl.load(slots_ptr + tl.program_id(0))
    own = _own(summands_ptr + cells, mask, num_elements, dtype, SPLITS)
    _push(
        _as_sent(own, INT, BITS), buffers_ptr, slot, capacity, first, mask, RANK, SIZE, INT, BLOCK
    )
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_STREAM:
        total = tl.load(stream_ptr + cells, mask=mask, other=0.0).to(tl.float32)
    total = _add_all(
        total, own, buffers_ptr, slot, capacity, first, mask, abort_ptr, RANK, SIZE, INT, BLOCK,
        LOOK_EVERY,
    )  # fmt: skip
    tl.store(stream_ptr + cells, total.to(dtype), mask=mask)
    tl.store(slots_ptr + tl.program_id(0), (slot + 1) % 3)


@triton.jit
def _best_of_ranks_kernel(
    keys_ptr, buffers_ptr, slots_ptr, abort_ptr, capacity, out_ptr, host_ptr, buffer_index_ptr,
    rows, host_stride, RANK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    LOOK_EVERY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    first = tl.program_id(0) * BLOCK
    row = first + tl.arange(0, BLOCK)
    mask = row < rows
    wait(PDL)
    best = tl.load(keys_ptr + row, mask=mask, other=0)
    if SIZE > 1:
        slot = tl.load(slots_ptr + tl.program_id(0))
        _push(best, buffers_ptr, slot, capacity, first, mask, RANK, SIZE, tl.int64, BLOCK)
        for sender in tl.static_range(SIZE):
            if sender != RANK:
                got = _receive(
                    sender, buffers_ptr, slot, capacity, first, mask, abort_ptr, RANK, SIZE,
                    tl.int64, BLOCK, LOOK_EVERY,
                )  # fmt: skip
                best = tl.maximum(best, got)
        tl.store(slots_ptr + tl.program_id(0), (slot + 1) % 3)
    low = best & 0xFFFFFFFF
    token = tl.where(low < 2, -1 - low, 0xFFFFFFFF - low)  # 0 and 1 stand for no token
    tl.store(out_ptr + row, token, mask=mask)
    tl.store(host_ptr + tl.load(buffer_index_ptr) * host_stride + row, token, mask=mask)


@triton.jit
def _own(summands, mask, split_stride, dtype: tl.constexpr, SPLITS: tl.constexpr):
    """The summand of this rank, rounded as it travels."""
    own = tl.load(summands, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        own += tl.load(summands + split * split_stride.to(tl.int64), mask=mask, other=0.0)
    return own.to(dtype)


@triton.jit
def _as_sent(own, INT: tl.constexpr, BITS: tl.constexpr):
    bits = own.to(INT, bitcast=True)
    return tl.where(bits == -1, (1 << (BITS - 1)) - 1, bits).to(INT)  # another NaN


@triton.jit
def _add_all(
    total, own, buffers_ptr, slot, capacity, first, mask, abort_ptr, RANK: tl.constexpr,
    SIZE: tl.constexpr, INT: tl.constexpr, BLOCK: tl.constexpr, LOOK_EVERY: tl.constexpr,
):  # fmt: skip
    """The total and the summands of all ranks, in the order of ranks, in float32."""
    for sender in tl.static_range(SIZE):
        if sender == RANK:
            total += own.to(tl.float32)
        else:
            got = _receive(
                sender, buffers_ptr, slot, capacity, first, mask, abort_ptr, RANK, SIZE, INT,
                BLOCK, LOOK_EVERY,
            )  # fmt: skip
            total += got.to(own.dtype, bitcast=True).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["number"])
def _wait_kernel(
    flags_ptr, number, abort_ptr, RANK: tl.constexpr, SIZE: tl.constexpr,
    LOOK_EVERY: tl.constexpr,
):  # fmt: skip
    for sender in tl.static_range(SIZE):
        if sender != RANK:
            missing = number - tl.load(flags_ptr + sender, volatile=True)
            readings = 0
            while missing > 0:
                missing = number - tl.load(flags_ptr + sender, volatile=True)
                readings += 1
                if readings % LOOK_EVERY == 0:
                    missing = tl.where(tl.load(abort_ptr, volatile=True) == 0, missing, 0)


@triton.jit
def _push(
    bits, buffers_ptr, slot, capacity, first, mask, RANK: tl.constexpr, SIZE: tl.constexpr,
    INT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a block to the other ranks, and refill the slots that were used the last time."""
    lane = tl.arange(0, BLOCK)
    for other in tl.static_range(SIZE):
        if other != RANK:
            there = _slot(buffers_ptr, other, slot, RANK, capacity, first, SIZE, INT)
            tl.store(there + lane, bits, mask=mask)
    for sender in tl.static_range(SIZE):
        if sender != RANK:
            last = _slot(buffers_ptr, RANK, (slot + 2) % 3, sender, capacity, first, SIZE, INT)
            tl.store(last + lane, tl.full([BLOCK], -1, INT))


@triton.jit
def _receive(
    sender, buffers_ptr, slot, capacity, first, mask, abort_ptr, RANK: tl.constexpr,
    SIZE: tl.constexpr, INT: tl.constexpr, BLOCK: tl.constexpr, LOOK_EVERY: tl.constexpr,
):  # fmt: skip
    """What another rank has written, once it is there."""
    here = _slot(buffers_ptr, RANK, slot, sender, capacity, first, SIZE, INT) + tl.arange(0, BLOCK)
    bits = tl.load(here, mask=mask, other=0, volatile=True)
    is_missing = tl.max((bits == -1).to(tl.int32), axis=0)
    readings = 0
    while is_missing != 0:
        bits = tl.load(here, mask=mask, other=0, volatile=True)
        is_missing = tl.max((bits == -1).to(tl.int32), axis=0)
        readings += 1
        if readings % LOOK_EVERY == 0:
            is_missing = tl.where(tl.load(abort_ptr, volatile=True) == 0, is_missing, 0)
    return bits


@triton.jit
def _slot(buffers_ptr, rank, slot, sender, capacity, first, SIZE: tl.constexpr, INT: tl.constexpr):
    """Where, in the buffer of `rank`, what `sender` writes from element `first` on begins."""
    buffer = tl.load(buffers_ptr + rank).to(tl.pointer_type(INT))
    offset = (slot * SIZE + sender).to(tl.int64) * capacity + first
    return tl.multiple_of(buffer + offset, 16)
