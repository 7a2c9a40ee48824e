"""Pairs of token and expert, sorted by expert, without the host.

Pair i is that of token i // top_k and its expert number i % top_k. A stable counting sort: each
expert's program counts the pairs of the experts before it, which is where its own begin, and writes
its own there. Nothing is shared between programs, so the result is always the same, and the
launch has a shape that depends on the number of tokens alone: a CUDA Graph can hold it.

Grid: (expert). Bytes moved: each program reads the experts of all pairs twice, from the
second-level cache. Bound by latency.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nanovllm.kernels.launch import launch_dependents, next_power_of_2, pdl, wait

_MOST_BLOCK = 2048


class MoePlan(NamedTuple):
    """Pairs by expert.

    Attributes:
        pairs: [pairs] int32, the pairs of expert 0, then those of expert 1, and so on.
        offsets: [experts + 1] int32, where each expert's begin; the last is their number.
    """

    pairs: torch.Tensor
    offsets: torch.Tensor


def plan_experts(experts: torch.Tensor, num_experts: int) -> MoePlan:
    """Sort the pairs of `experts` [tokens, top_k] int32."""
    num_pairs = experts.numel()
    pairs = torch.empty(num_pairs, dtype=torch.int32, device=experts.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=experts.device)
    block = max(128, min(_MOST_BLOCK, next_power_of_2(num_pairs)))
    _plan_kernel[(num_experts,)](
        experts, pairs, offsets, num_pairs, BLOCK=block, num_warps=block // 256 or 1,
        **pdl(experts),
    )  # fmt: skip
    return MoePlan(pairs, offsets)


def max_tiles(num_pairs: int, num_experts: int, rows: int) -> int:
    """The most tiles of `rows` pairs of one expert that so many pairs can make: all experts that
    can be hit are, and the last tile of each has one pair."""
    hit = min(num_pairs, num_experts)
    return hit + (num_pairs - hit) // rows


@triton.jit
def _plan_kernel(
    experts_ptr, pairs_ptr, offsets_ptr, num_pairs, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    launch_dependents(PDL)
    wait(PDL)
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_pairs, BLOCK):
        pair = first + lane
        experts = tl.load(experts_ptr + pair, mask=pair < num_pairs, other=2**31 - 1)
        before += (experts < expert).to(tl.int32)
    start = tl.sum(before, axis=0)
    tl.store(offsets_ptr + expert, start)
    for first in range(0, num_pairs, BLOCK):
        pair = first + lane
        experts = tl.load(experts_ptr + pair, mask=pair < num_pairs, other=2**31 - 1)
        is_own = (experts == expert).to(tl.int32)
        place = start + tl.cumsum(is_own, axis=0) - 1
        tl.store(pairs_ptr + place, pair, mask=is_own != 0)
        start += tl.sum(is_own, axis=0)
    if expert == tl.num_programs(0) - 1:
        tl.store(offsets_ptr + expert + 1, start)
