"""The experts of a few tokens with weights in fp8: each matrix times one vector, in fp8 too.

    h[t, j] = silu(W_gate x[t]) * (W_up x[t])             of expert j of token t
    out[t] = sum over j of weight[t, j] * W_down h[t, j]      or added to the residual stream

It is `kernels.expert_gemv` for weights of half the bytes, and what is said there holds here. x and
h come as `kernels.fp8_rows` makes them: as bytes, like the weights, so that a thread has the same
16 numbers of both. It multiplies and adds up these in float32, before their scales are applied.

Grid: (slice of the inner features, pair of token and expert), then (slice of the output, token).
Bytes moved: the weights of the experts that are hit. Bound by memory.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.activation import silu_times
from nanovllm.kernels.launch import (
    cdiv,
    launch_dependents,
    next_power_of_2,
    pdl,
    prefer_shared_memory,
    wait,
)
from nanovllm.quantization.fp8 import GROUP, Fp8Weight

_ROWS = 8  # of the weight in a program: some hundred programs for a token
_GATE_UP_BLOCK, _DOWN_BLOCK = 512, 256  # of K
_LANE = tl.constexpr(16)  # numbers that a thread loads at once


def fp8_expert_gate_up(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    gate_up: Fp8Weight,
    experts: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """silu(gate) * up of each pair: [tokens * top_k, inner] of `dtype`.

    Args:
        x, x_scale: [tokens, hidden] e4m3, and what `quantize_rows` returns with it.
        gate_up: [experts, 2 * inner, hidden], gate then up.
        experts: [tokens, top_k] int32.
    """
    (tokens, k), n, num_pairs = x.shape, gate_up.values.shape[1] // 2, experts.numel()
    h = torch.empty(num_pairs, n, dtype=dtype, device=x.device)
    kernel = _fp8_gate_up_kernel[(cdiv(n, _ROWS), num_pairs)](
        x, x_scale, *gate_up, experts, h, tokens, n, k, experts.shape[1],
        ROWS=_ROWS, **_blocks(k, _GATE_UP_BLOCK, gate_up), num_warps=4, **pdl(x),
    )  # fmt: skip
    prefer_shared_memory(kernel)
    return h


def fp8_expert_down(
    h: torch.Tensor,
    h_scale: torch.Tensor,
    down: Fp8Weight,
    experts: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    add: bool,
) -> torch.Tensor:
    """The weighted sum of the experts' outputs, in `out`, which is returned.

    Args:
        h, h_scale: [tokens * top_k, inner] e4m3, and what `quantize_rows` returns with it.
        down: [experts, hidden, inner].
        experts, weights: [tokens, top_k] int32 and float32.
        out: [tokens, hidden].
        add: the sum is added to what is there.
    """
    (tokens, top_k), n, (pairs, k) = experts.shape, down.values.shape[1], h.shape
    kernel = _fp8_down_kernel[(cdiv(n, _ROWS), tokens)](
        h, h_scale, *down, experts, weights, out, pairs, n, k, TOP_K=top_k, ADD=add,
        ROWS=_ROWS, **_blocks(k, _DOWN_BLOCK, down), num_warps=4, **pdl(h),
    )  # fmt: skip
    prefer_shared_memory(kernel)
    return out


def _blocks(k: int, most: int, weight: Fp8Weight) -> dict[str, int]:
    """A block of K, the numbers that have a scale in common, and how many scales a block has."""
    block = max(GROUP, min(most, next_power_of_2(k)))
    if weight.has_groups:
        return {"BLOCK_K": block, "GROUP": GROUP, "SCALES": block // GROUP}
    return {"BLOCK_K": block, "GROUP": k, "SCALES": 1}


@triton.jit
def _fp8_gate_up_kernel(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, experts_ptr, h_ptr, tokens, n, k: tl.constexpr,
    top_k, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SCALES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait(PDL)
    pair = tl.program_id(1)
    token = pair // top_k
    expert = tl.load(experts_ptr + pair).to(tl.int64)
    outs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_out = (outs < n)[:, None]
    cols = tl.arange(0, BLOCK_K)
    gates = weight_ptr + (expert * 2 * n + outs)[:, None] * k + cols[None, :]
    ups = weight_ptr + (expert * 2 * n + n + outs)[:, None] * k + cols[None, :]
    # The same for every row, but laid out like the weights: no exchange between threads.
    xs = x_ptr + token.to(tl.int64) * k + cols[None, :] + outs[:, None] * 0
    scales = scale_ptr + expert * 2 * n * tl.cdiv(k, GROUP) + outs[:, None]
    acc = tl.zeros([ROWS, SCALES, BLOCK_K // _LANE // SCALES], tl.float32)
    acc_up = tl.zeros([ROWS, SCALES, BLOCK_K // _LANE // SCALES], tl.float32)
    for start in tl.static_range(0, k, BLOCK_K):
        inside = (start + cols < k)[None, :]
        gate = tl.load(gates + start, mask=is_out & inside, other=0.0, cache_modifier=".cg")
        up = tl.load(ups + start, mask=is_out & inside, other=0.0, cache_modifier=".cg")
        x = tl.load(xs + start, mask=inside, other=0.0).to(tl.float32)
        group = start // GROUP + tl.arange(0, SCALES)[None, :]
        has_any = group * GROUP < k
        x_scale = tl.load(x_scale_ptr + group * tokens + token, mask=has_any, other=0)
        mask, at = is_out & has_any, group * 2 * n
        scale = x_scale * tl.load(scales + at, mask=mask, other=0)
        acc += _sums(gate, x, SCALES) * scale[:, :, None]
        scale = x_scale * tl.load(scales + n + at, mask=mask, other=0)
        acc_up += _sums(up, x, SCALES) * scale[:, :, None]
    y = silu_times(_total(acc), _total(acc_up))
    tl.store(h_ptr + pair.to(tl.int64) * n + outs, y.to(h_ptr.dtype.element_ty), mask=outs < n)


@triton.jit
def _fp8_down_kernel(
    h_ptr, h_scale_ptr, weight_ptr, scale_ptr, experts_ptr, weights_ptr, out_ptr, pairs, n,
    k: tl.constexpr, TOP_K: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait(PDL)
    token = tl.program_id(1).to(tl.int64)
    outs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_out = (outs < n)[:, None]
    cols = tl.arange(0, BLOCK_K)
    hs = h_ptr + cols[None, :] + outs[:, None] * 0  # laid out like the weights
    acc = tl.zeros([ROWS, SCALES, BLOCK_K // _LANE // SCALES], tl.float32)
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        expert = tl.load(experts_ptr + pair).to(tl.int64)
        matrix = weight_ptr + (expert * n + outs)[:, None] * k + cols[None, :]
        scales = scale_ptr + expert * n * tl.cdiv(k, GROUP) + outs[:, None]
        weight = tl.load(weights_ptr + pair)
        for start in tl.static_range(0, k, BLOCK_K):
            inside = (start + cols < k)[None, :]
            w = tl.load(matrix + start, mask=is_out & inside, other=0.0, cache_modifier=".cg")
            h = tl.load(hs + pair * k + start, mask=inside, other=0.0).to(tl.float32)
            group = start // GROUP + tl.arange(0, SCALES)[None, :]
            has_any = group * GROUP < k
            h_scale = tl.load(h_scale_ptr + group * pairs + pair, mask=has_any, other=0)
            scale = tl.load(scales + group * n, mask=is_out & has_any, other=0)
            acc += _sums(w, h, SCALES) * (weight * h_scale * scale)[:, :, None]
    total = _total(acc)
    target = out_ptr + token * n + outs
    if ADD:
        total += tl.load(target, mask=outs < n, other=0.0).to(tl.float32)
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=outs < n)


@triton.jit
def _sums(w, x, SCALES: tl.constexpr):
    """Of the products of a thread's 16 numbers: [rows, scales, K / scales / 16]. Scales of groups
    are so few that each thread loads its own: no exchange between threads."""
    LANES: tl.constexpr = w.shape[1] // _LANE // SCALES
    products = w.to(tl.float32) * x
    return tl.sum(tl.reshape(products, [w.shape[0], SCALES, LANES, _LANE]), axis=3)


@triton.jit
def _total(acc):
    """[rows]."""
    return tl.sum(tl.reshape(acc, [acc.shape[0], acc.shape[1] * acc.shape[2]]), axis=1)
