"""Sums over ranks and the best of their tokens, by one rank at a time: what the others would write
is there already, and what it writes to them is looked at. parallel/ has tests of real ranks.
"""

import json
from pathlib import Path

import pytest
import torch

from helpers.compile_launches import run_compiler
from helpers.kernel_inputs import (
    FP16,
    FP32,
    interpreted,
    normal,
)
from helpers.peers import Inbox
from nanovllm.kernels.all_reduce import (
    all_reduce,
    all_reduce_add,
    best_of_ranks,
    wait_for,
)

pytestmark = [interpreted, pytest.mark.usefixtures("poison")]
SHAPES = [(1, 96), (3, 700), (2, 1024), (5, 1000)]


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("size", [2, 3])
def test_the_sum_over_ranks_is_added_and_the_own_part_sent(size: int, dtype: torch.dtype) -> None:
    """Call after call, each with other numbers and another size, through the slots in turns."""
    for rank in range(size):
        inbox = Inbox(rank, size, dtype, capacity=6144)
        for call, shape in enumerate(SHAPES * 2):
            summands = [normal(*shape, dtype=dtype, seed=10 * call + r) for r in range(size)]
            stream = normal(*shape, dtype=dtype, seed=100 + call)
            total = stream.double() + sum(summand.double() for summand in summands)
            inbox.fill({r: summands[r] for r in range(size) if r != rank})
            all_reduce_add(stream, summands[rank], inbox.peers)
            torch.testing.assert_close(stream, total.to(dtype))
            for other in range(size):
                if other != rank:
                    assert torch.equal(inbox.sent_to(other, shape), summands[rank])


def test_all_ranks_get_the_same_bits() -> None:
    shape, size, found = (4, 512), 3, []
    summands = [normal(*shape, dtype=FP16, seed=r) for r in range(size)]
    for rank in range(size):
        inbox = Inbox(rank, size, FP16, capacity=2048)
        stream = normal(*shape, dtype=FP16, seed=9)
        inbox.fill({r: summands[r] for r in range(size) if r != rank})
        all_reduce_add(stream, summands[rank], inbox.peers)
        found.append(stream)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_partial_sums_are_added_up_and_rounded_before_they_travel() -> None:
    splits, shape = 3, (4, 300)
    own, other = normal(splits, *shape, dtype=FP32, seed=1), normal(*shape, dtype=FP16, seed=2)
    inbox = Inbox(0, 2, FP16, capacity=2048)
    stream = normal(*shape, dtype=FP16, seed=3)
    rounded = ((own[0] + own[1]) + own[2]).half()
    expected = (stream.float() + rounded.float() + other.float()).half()
    inbox.fill({1: other})
    all_reduce_add(stream, own, inbox.peers)
    assert torch.equal(inbox.sent_to(1, shape), rounded)
    assert torch.equal(stream, expected)


def test_without_a_stream_the_sum_replaces_the_summand() -> None:
    mine, other = normal(2, 300, dtype=FP32, seed=1), normal(2, 300, dtype=FP32, seed=2)
    inbox = Inbox(1, 2, FP32, capacity=1024)
    inbox.fill({0: other})
    expected = other + mine
    all_reduce(mine, inbox.peers)
    assert torch.equal(mine, expected)


def test_a_slot_is_empty_again_when_its_turn_comes() -> None:
    """Of a large sum and then small ones, no word of it may be taken for one of a later sum."""
    inbox = Inbox(0, 2, FP16, capacity=4096)
    for call, shape in enumerate([(2, 2048), (1, 8), (1, 8), (1, 8)]):
        before = inbox.received(1)
        assert (before[: shape[0] * shape[1]] == -1).all(), call
        inbox.fill({1: normal(*shape, dtype=FP16, seed=call)})
        stream = torch.zeros(shape, dtype=FP16)
        all_reduce_add(stream, stream.clone(), inbox.peers)
    # The programs of the large sum have gone round once, but the first, which went on.
    assert inbox.peers.slots.tolist() == [1, 1, 1, 1]


def test_the_number_that_stands_for_nothing_is_never_sent() -> None:
    """All ones is a NaN; another NaN goes in its place, or the others would wait for ever."""
    stream = torch.zeros(1, 64, dtype=FP16)
    summand = torch.full((1, 64), -1, dtype=torch.int16).view(FP16)
    inbox = Inbox(0, 2, FP16, capacity=1024)
    inbox.fill({1: torch.ones(1, 64, dtype=FP16)})
    all_reduce_add(stream, summand, inbox.peers)
    sent = inbox.sent_to(1, (1, 64))
    assert sent.isnan().all() and (sent.view(torch.int16) != -1).all()
    assert stream.isnan().all()


def test_nobody_waits_any_more_after_abort() -> None:
    inbox = Inbox(0, 2, FP32, capacity=1024)
    inbox.peers.abort.fill_(1)
    stream = torch.zeros(1, 64)
    all_reduce_add(stream, torch.ones(1, 64), inbox.peers)  # it would never return


@pytest.mark.parametrize("rows", [1, 5])
def test_the_largest_key_of_the_ranks_gives_the_token(rows: int) -> None:
    keys = torch.randint(-(2**62), 2**62, (3, rows), generator=torch.Generator().manual_seed(rows))
    keys[0, -1] = 0x7FFFFFFF << 32  # no token to sample: NaN, say
    inbox = Inbox(1, 3, torch.int64, capacity=1024)
    inbox.fill({0: keys[0], 2: keys[2]})
    out, host = torch.zeros(rows, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64)
    index = torch.tensor([1], dtype=torch.int32)
    best_of_ranks(keys[1].clone(), inbox.peers, out, host, index)
    expected = 0xFFFFFFFF - (keys.amax(dim=0) & 0xFFFFFFFF)
    expected[-1] = -1
    assert torch.equal(out, expected) and torch.equal(host[1, :rows], expected)
    assert not host[0].any()
    assert torch.equal(inbox.sent_to(0, (rows,)), keys[1])
    best_of_ranks(keys.amax(dim=0), None, out.zero_(), host.zero_(), index)
    assert torch.equal(out, expected) and torch.equal(host[1, :rows], expected)


@pytest.mark.parametrize("number", [5, 2**31 - 1, -(2**31)])
def test_flags_are_waited_for_as_they_grow_past_the_largest_integer(number: int) -> None:
    peers = Inbox(1, 3, torch.int64, capacity=1024).peers
    reached = torch.tensor([number, 0, number], dtype=torch.int32)
    wait_for(reached, number, peers)
    wait_for(reached + 1, number, peers)  # from 2^31 - 1 to -2^31 too
    peers.abort.fill_(1)
    wait_for(reached - 1, number, peers)  # it would never return


FACTS = """
import json
import torch
from types import SimpleNamespace
from helpers.compile_launches import A100, H100, launches
from nanovllm.kernels.all_reduce import all_reduce_add, best_of_ranks, wait_for

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

int32, int64, float32 = torch.int32, torch.int64, torch.float32
found = []
for card in (A100, H100):
    for size in (2, 8):
        def peers(bits):
            return SimpleNamespace(
                rank=1, size=size, capacity=2**20, bits=bits, buffers=empty(size, dtype=int64),
                slots=empty(1024, dtype=int32), abort=empty(1, dtype=int32),
            )
        x, splits = empty(32, 5120), empty(2, 32, 5120, dtype=float32)
        for kernel, *args in (
            (all_reduce_add, x, x, peers(torch.int16)),
            (all_reduce_add, x, splits, peers(torch.int16)),
            (best_of_ranks, empty(32, dtype=int64), peers(int64), empty(32, dtype=int64),
             empty(2, 512, dtype=int64), empty(1, dtype=int32)),
            (wait_for, empty(size, dtype=int32), 7, peers(torch.int16)),
        ):
            (launch,) = launches(kernel, *args, card=card)
            wide = "ld.volatile.global.v4" in launch.compiled.asm["ptx"]
            found.append((kernel.__name__, launch.spills, launch.registers, wide))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_they_compile_without_spills_and_read_16_bytes_at_a_time(tmp_path: Path) -> None:
    found = json.loads(run_compiler(FACTS, tmp_path))
    assert len(found) == 16
    for name, spills, registers, is_wide in found:
        # On an A100 the compiler keeps one number of best_of_ranks in memory.
        assert spills <= 8 * (name == "best_of_ranks") and registers <= 128, name
        if name == "all_reduce_add":
            assert is_wide, name
